"""Where image features are kept, within a bound: in memory, or on a disk that runs share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)

Features = Mapping[str, Tensor]

SEAL = hashlib.sha256().digest_size  # bytes before the content: its sha256
ENDING = ".features"
UNFINISHED = ".tmp"
FORGOTTEN = 3600  # seconds after which nobody is writing a file any more


class FeatureStore(ABC):
    """Features by key; what was used least recently makes room. Safe to share between threads.

    Args:
        limit: Most bytes to keep.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def get(self, key: str) -> Features | None:
        """The features of a key, or None if they are not here, or not whole."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
        found = self._read(key)
        if found is None:
            self._drop(key)
        return found

    def put(self, key: str, features: Features) -> None:
        """Keep features; too large ones, and those that cannot be written, are let go."""
        size = self._write(key, features)
        if size is None:
            return
        with self._lock:
            self.bytes += size - self._sizes.pop(key, 0)
            self._sizes[key] = size
            oldest = []
            while self.bytes > self.limit:
                name, freed = self._sizes.popitem(last=False)
                self.bytes -= freed
                oldest.append(name)
        for name in oldest:
            self._remove(name)

    def _drop(self, key: str) -> None:
        with self._lock:
            self.bytes -= self._sizes.pop(key, 0)
        self._remove(key)

    @abstractmethod
    def _read(self, key: str) -> Features | None: ...

    @abstractmethod
    def _write(self, key: str, features: Features) -> int | None:
        """Write, and say how many bytes that takes."""

    @abstractmethod
    def _remove(self, key: str) -> None: ...


class MemoryStore(FeatureStore):
    """Features in the memory of the CPU, for this process alone."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._held: dict[str, Features] = {}

    def _read(self, key: str) -> Features | None:
        return self._held.get(key)

    def _write(self, key: str, features: Features) -> int | None:
        size = features_bytes(features)
        if size > self.limit:
            return None
        self._held[key] = {name: tensor.cpu() for name, tensor in features.items()}
        return size

    def _remove(self, key: str) -> None:
        self._held.pop(key, None)


class DiskStore(FeatureStore):
    """A file each: a seal, and tensors that name their key. It appears whole or not at all.

    A file's time says when it was last used, for the runs that come later too.

    Args:
        folder: Where; made if it is not there.
        limit: Most bytes to keep, those of earlier runs included.

    Raises:
        OSError: If the folder cannot be made or read.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        super().__init__(limit)
        self.folder = folder
        self.faults = 0  # files that were not whole
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{UNFINISHED}"):  # a killed run's; another's may be a moment old
            if time.time() - path.stat().st_mtime > FORGOTTEN:
                path.unlink(missing_ok=True)
        statuses = [(path, path.stat()) for path in folder.glob(f"??/*{ENDING}")]
        for path, status in sorted(statuses, key=lambda each: each[1].st_mtime_ns):
            self._sizes[path.stem] = status.st_size
            self.bytes += status.st_size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{ENDING}"

    def _read(self, key: str) -> Features | None:
        path = self._path(key)
        try:
            sealed = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:  # another run made room
            return None
        except OSError as error:
            logger.warning("%s cannot be read: %s; its image is looked at again", path, error)
            return None
        found = _unsealed(sealed, key)
        if found is None:
            self.faults += 1
            logger.warning("%s is not what was written; its image is looked at again", path)
        return found

    def _write(self, key: str, features: Features) -> int | None:
        from safetensors.torch import save

        content = save(
            {name: tensor.cpu().contiguous() for name, tensor in features.items()}, {"key": key}
        )
        path = self._path(key)
        if len(content) + SEAL > self.limit:
            return None
        temporary = self.folder / f"{key}.{os.getpid()}.{threading.get_ident()}{UNFINISHED}"
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            temporary.replace(path)
        except OSError as error:  # a full disk costs time, nothing else
            logger.warning("%s cannot be written: %s; its image is looked at live", path, error)
            temporary.unlink(missing_ok=True)
            return None
        return len(content) + SEAL

    def _remove(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)


def features_bytes(features: Features) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in features.values())


def _unsealed(sealed: bytes, key: str) -> Features | None:
    """The tensors of a file; None if a bit of it is another, or it belongs to another key."""
    from safetensors.torch import load

    content = sealed[SEAL:]
    if hashlib.sha256(content).digest() != sealed[:SEAL]:
        return None
    length = int.from_bytes(content[:8], "little")  # of the header, which safetensors begins with
    header = json.loads(content[8 : 8 + length])
    if header["__metadata__"]["key"] != key:
        return None
    loaded: Features = load(content)
    return loaded

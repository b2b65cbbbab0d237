"""All trackers of a run.

A tracker is company, not part of the training: each one lives in a process of its own behind a
bounded queue, so that one that fails, hangs or lags is left behind with one warning while the
training goes on, unchanged. ``metrics.jsonl`` in the run folder holds everything anyway.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import pickle
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtune.errors import MissingExtraError
from vlmtune.files import write_json
from vlmtune.training.tracking import background
from vlmtune.training.tracking.background import Background
from vlmtune.training.tracking.config import TrackingConfig
from vlmtune.training.tracking.service import SERVICES, Opening, Shown
from vlmtune.training.tracking.worker import Call, Log, Show

logger = logging.getLogger(__name__)

IDS = "ids.json"  # of the run in each service, so that a resumed run goes on there
SECRET_NAME = re.compile(
    r"(^|_)(api_?key|password|passwd|secret|token|credentials?|authorization)$", re.IGNORECASE
)
PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


class Trackers:
    """All trackers of a run; calls return at once and never raise."""

    def __init__(self, trackers: Sequence[Background] = ()) -> None:
        self._trackers = trackers
        self._shown: set[bytes] = set()

    def __bool__(self) -> bool:
        """Whether there is anybody to show something to."""
        return bool(self._trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step; those that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._send(Log(step, finite))

    def show(self, step: int, rows: Sequence[Shown]) -> None:
        """The table of predictions at a step, unless it was shown there already."""
        digest = hashlib.sha256(pickle.dumps((step, rows))).digest()
        if digest in self._shown:
            return
        self._shown.add(digest)
        self._send(Show(step, rows))

    def _send(self, call: Call) -> None:
        message = pickle.dumps(call)
        for each in self._trackers:
            each.send(message)

    def finish(self) -> None:
        """Waits a little for what is left to be sent."""
        for each in self._trackers:
            each.close()
        deadline = time.monotonic() + background.CLOSE_S
        for each in self._trackers:
            each.wait(deadline)


def open_trackers(
    config: TrackingConfig,
    *,
    folder: Path,
    name: str,
    hyperparameters: Mapping[str, Any],
    begins: int = 0,
) -> Trackers:
    """Opens the trackers that the recipe names, and does not wait for them.

    Call it on the first rank only. Nothing is raised: a tracker that is not installed or cannot be
    opened is left out with a warning.

    Args:
        config: Which, and under which names.
        folder: The run's folder; files of the trackers go to ``folder/tracking``.
        name: The run's name, unless ``config`` has one.
        hyperparameters: What is shown beside the run; passwords in it are left out.
        begins: The first step that is told.
    """
    opened = []
    for service in dict.fromkeys(config.to):
        try:
            opening = _opening(config, service, folder / "tracking", name, hyperparameters, begins)
            opened.append(Background(service, SERVICES[service], opening))
        except MissingExtraError as error:
            logger.warning("%s. Training goes on without it", error)
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("Tracker %s is left out: %s. Training goes on", service, error)
    return Trackers(opened)


def _opening(
    config: TrackingConfig,
    service: str,
    folder: Path,
    name: str,
    hyperparameters: Mapping[str, Any],
    begins: int,
) -> Opening:
    package = SERVICES[service].package
    if not _installed(package):
        raise MissingExtraError(package, package, f"tracking.to={service}")
    identity, resumed = _identity(folder, service)
    return Opening(
        project=config.project or "vlmtune",
        name=config.name or name,
        id=identity,
        resumed=resumed,
        begins=begins,
        workspace=config.workspace,
        mode=config.mode,
        folder=str((folder / service).absolute()),
        hyperparameters=without_secrets(hyperparameters),
    )


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    # A folder of that name, as W&B leaves one behind, is a package to Python; but without a file.
    return found is not None and found.origin is not None


def _identity(folder: Path, service: str) -> tuple[str, bool]:
    """The run's identity in a service, and whether it was opened there before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / IDS
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if service in known:
        return known[service], True
    known[service] = uuid.uuid4().hex[:16]
    write_json(path, known)
    return known[service], False


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values without texts named like secrets, and without passwords in addresses."""
    return {
        key: _without_passwords(value)
        for key, value in values.items()
        if not (SECRET_NAME.search(key) and isinstance(value, str))
    }


def _without_passwords(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return [_without_passwords(each) for each in value]
    return PASSWORD.sub("***", value) if isinstance(value, str) else value

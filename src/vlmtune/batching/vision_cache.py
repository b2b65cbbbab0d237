"""Every image through a frozen vision tower once, whatever the number of epochs.

Features are found by what they depend on and nothing else: the image's bytes, how it is shown (the
contract), the weights of tower and projector, and the number format. Whatever changes one of these
finds nothing, and the tower looks again.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from vlmtune.batching.feature_store import FeatureStore
from vlmtune.data.conversation import Conversation, EncodedImage
from vlmtune.data.media import Size, open_image, read_header
from vlmtune.models.contract import Contract
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import FamilyFacts
from vlmtune.models.features import image_features, vision_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
PAYS_FROM = 0.1  # of the times that an image is looked at, as many must be spared
AHEAD = 4  # rows decoded while the tower looks at one


@dataclass(frozen=True)
class Forecast:
    """How often images are looked at, counted before anything is computed.

    Attributes:
        sightings: Times that an image of these rows goes through the tower without a cache.
        images: Different images.
        tokens: Their visual tokens.
        area: Pixels at which the model sees them.
        area_squares: The sum of the squares of each one's.
    """

    sightings: float
    images: int
    tokens: int
    area: float
    area_squares: float

    @property
    def pays(self) -> bool:
        """Whether enough of the tower's work is spared."""
        return self.sightings - self.images >= max(PAYS_FROM * self.sightings, 1)


class VisionCache:
    """Features of images, found by key.

    Args:
        encoder: The model's encoder; what it says of images is part of every key.
        store: Where they are kept.
        identity: What else features depend on, see ``identity_of``.
    """

    def __init__(self, encoder: Encoder, store: FeatureStore, identity: str) -> None:
        self.encoder = encoder
        self.store = store
        self._identity = identity
        self._shown: dict[int, bytes] = {}

    def key(self, image: EncodedImage, images: int) -> str:
        """The key of an image in a row that has so many."""
        if images not in self._shown:
            policy = self.encoder.family.row_policy(self.encoder.contract.image, images)
            text = f"{self._identity}|{policy.model_dump_json()}|"
            self._shown[images] = text.encode()
        return hashlib.sha256(self._shown[images] + hashlib.sha256(image.data).digest()).hexdigest()

    def keys(self, row: Conversation) -> list[str]:
        """Keys of a row's images."""
        return [self.key(image, len(row.images)) for image in row.images]

    def find(self, row: Conversation) -> dict[str, Tensor] | None:
        """What stands for all images of a row; None if one of them is not here."""
        found = []
        for key in self.keys(row):
            features = self.store.get(key)
            if features is None:
                return None
            found.append(features)
        return self.encoder.family.join_vision(found)

    def forecast(self, rows: Iterable[Conversation], times: float) -> Forecast:
        """Count images of rows that are each used so many times; nothing is decoded."""
        count, tokens, areas, known = 0, 0, [], set()
        family, contract = self.encoder.family, self.encoder.contract
        for row in rows:
            for key, image in zip(self.keys(row), row.images, strict=True):
                count += 1
                if key not in known:
                    known.add(key)
                    size = read_header(image.data, contract.image).size
                    policy = family.row_policy(contract.image, len(row.images))
                    tokens += family.visual_tokens(size, policy)
                    seen = family.resized(size, policy)
                    areas.append(float(seen.width * seen.height))
        squares = sum(area * area for area in areas)
        return Forecast(count * times, len(known), tokens, sum(areas), squares)

    def fill(
        self,
        model: PreTrainedModel,
        rows: Iterable[Conversation],
        *,
        workers: int = 0,
        group_tokens: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Look at every image that is not known yet, in the order of the rows.

        Args:
            model: The model, on its device; the caller chooses the number format.
            rows: Rows, with images or without.
            workers: Threads that decode ahead of the tower.
            group_tokens: Visual tokens that go through the tower together. 0: those of a row, so
                that features depend on nothing but it; a GPU would idle.
            progress: Called with the number of rows so far.

        Returns:
            Number of images that were looked at.
        """
        training, looked = model.training, 0
        model.eval()
        try:
            for done, group in self._groups(rows, workers, group_tokens):
                looked += self._look(model, group)
                if progress is not None:
                    progress(done)
        finally:
            model.train(training)
        return looked

    def _groups(
        self, rows: Iterable[Conversation], workers: int, tokens: int
    ) -> Iterator[tuple[int, list[_Seen]]]:
        """Rows of which something is not known, some at a time; and how many are behind."""
        group: list[_Seen] = []
        done = 0
        with ThreadPoolExecutor(max(1, workers)) as pool:
            waiting: deque[tuple[int, Future[_Seen]]] = deque()
            for done, row in self._unknown(rows):
                waiting.append((done, pool.submit(self._open, row)))
                if len(waiting) > AHEAD:
                    done, future = waiting.popleft()
                    group.append(future.result())
                if group and sum(sum(seen.tokens) for seen in group) >= tokens:
                    yield done, group
                    group = []
            for done, future in waiting:
                group.append(future.result())
                if sum(sum(seen.tokens) for seen in group) >= tokens:
                    yield done, group
                    group = []
        if group:
            yield done, group

    def _unknown(self, rows: Iterable[Conversation]) -> Iterator[tuple[int, Conversation]]:
        """Rows with an image that no row before them had; and how many are behind."""
        begun: set[str] = set()
        for index, row in enumerate(rows):
            new = set(self.keys(row)) - begun
            begun |= new
            # Read, not only looked up: what is not whole is made anew, and now.
            if any(self.store.get(key) is None for key in new):
                yield index + 1, row

    def _open(self, row: Conversation) -> _Seen:
        contract = self.encoder.contract
        pictures = [open_image(image.data, contract.image) for image in row.images]
        tokens = [self._tokens(Size(*picture.size), len(pictures)) for picture in pictures]
        vision = self.encoder.family.image_inputs(pictures, contract.image)
        return _Seen(self.keys(row), tokens, vision)

    def _look(self, model: PreTrainedModel, group: Sequence[_Seen]) -> int:
        keys = [key for seen in group for key in seen.keys]
        tokens = [count for seen in group for count in seen.tokens]
        vision = self.encoder.family.join_vision([seen.vision for seen in group])
        looked = 0
        found = image_features(model, self.encoder.family, vision, tokens)
        for key, features in zip(keys, found, strict=True):
            if key not in self.store:  # the first look at an image stays
                self.store.put(key, features)
                looked += 1
        return looked

    def _tokens(self, size: Size, images: int) -> int:
        family, policy = self.encoder.family, self.encoder.contract.image
        return family.visual_tokens(size, family.row_policy(policy, images))


@dataclass(frozen=True)
class _Seen:
    """A row's images, decoded: their keys, their visual tokens, the vision tensors of all."""

    keys: list[str]
    tokens: list[int]
    vision: dict[str, Tensor]


class CachingEncoder(Encoder):
    """An encoder that puts features in the place of pixels where they are known.

    Nothing of such a row is decoded; its bytes are hashed, and other bytes find nothing.

    Args:
        cache: The features, and the encoder that it stands for.
    """

    def __init__(self, cache: VisionCache) -> None:
        super().__init__(cache.encoder.family, cache.encoder.contract)
        self.cache = cache

    def encode_together(
        self, conversations: Sequence[Conversation], *, ask: bool = False
    ) -> list[Encoded]:
        """As every encoder does. Features and pixels do not meet in a forward: one or the other."""
        encoded = []
        for row in conversations:
            features = self.cache.find(row)
            if features is None:
                return super().encode_together(conversations, ask=ask)
            encoded.append(self._encoded(row, features, ask=ask))
        return encoded

    def _encoded(self, row: Conversation, features: dict[str, Tensor], *, ask: bool) -> Encoded:
        tokens = self.tokens(row, ask=ask)
        positions = self.family.positions(tokens, self.contract.image)
        return Encoded(id=row.id, tokens=tokens, positions=positions, vision=features)


def identity_of(
    model: PreTrainedModel, facts: FamilyFacts, contract: Contract, compute: torch.dtype
) -> str:
    """What features depend on besides the image and how it is shown.

    Args:
        model: The model; the weights of its tower and projector are read and hashed.
        facts: Its family's facts.
        contract: What prepares the images.
        compute: Number format of the matrix products.
    """
    said = {
        "format": FORMAT,
        "family": contract.family,
        "processor": contract.processor.model_dump(mode="json"),
        "weights": vision_digest(model, facts),
        "compute": str(compute),
        "device": model.device.type,
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

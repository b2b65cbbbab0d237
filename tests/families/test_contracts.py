"""The contract of every family: ids and pixels equal, hash for hash, wherever a row is encoded."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from tiny_rows import BASE, asked, encoder_of
from vlmtune.data.conversation import EncodedImage
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.contract import Contract, verify_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
from vlmtune.models.save import save_model


def encoded(image: Pictures.Image, form: str = "PNG", **options) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return EncodedImage(buffer.getvalue())


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Pictures.Image:
    bands = len(Pictures.new(mode, (1, 1)).getbands())
    shape = (height, width) if bands == 1 else (height, width, bands)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Pictures.fromarray(values, mode if mode != "1" else "L").convert(mode)


def awkward() -> list[EncodedImage]:
    """Fifty pictures that preprocessing is known to go wrong on."""
    exif = Pictures.Exif()
    pictures = []
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        pictures.append(encoded(noise(57, 33, seed=orientation), "JPEG", exif=exif))
    for seed, mode in enumerate(("L", "LA", "RGBA", "P", "1", "CMYK", "RGB")):
        form = "JPEG" if mode == "CMYK" else "PNG"
        pictures += [
            encoded(noise(41, 29, mode, seed), form),
            encoded(noise(90, 17, mode, seed), form),
        ]
    deep = np.random.default_rng(1).integers(0, 65536, (31, 47), dtype=np.uint16)
    pictures += [encoded(Pictures.fromarray(deep)), encoded(Pictures.fromarray(deep), "TIFF")]
    palette = noise(30, 30).convert("P")
    pictures.append(encoded(palette, "GIF", transparency=3))
    sizes = [(1, 1), (2, 1), (1, 9), (3, 3), (13, 14), (14, 13), (28, 28), (29, 27), (199, 3)]
    sizes += [(3, 150), (140, 140), (141, 139), (300, 200), (200, 300), (640, 48), (48, 640)]
    pictures += [encoded(noise(*size, seed=size[0])) for size in sizes]
    pictures += [encoded(noise(70, 50, seed=seed), "WEBP", lossless=True) for seed in range(3)]
    pictures += [encoded(noise(61, 47, seed=seed), "BMP") for seed in range(3)]
    pictures += [encoded(noise(55, 44, seed=seed), "JPEG", quality=30) for seed in range(3)]
    assert len(pictures) == 50
    return pictures


AWKWARD = awkward()


def hashes(encoder: Encoder, *, ask: bool) -> list[str]:
    """What a row becomes, one hash a picture: ids up to the answer, and every vision tensor."""
    found = []
    for number, image in enumerate(AWKWARD):
        seen = encoder.encode(asked("What is this? 这是什么？", "yes", image), ask=ask)
        prompt = len(encoder.tokens(asked("What is this? 这是什么？", "yes", image), ask=True))
        digest = hashlib.sha256(seen.tokens.ids[:prompt].tobytes())
        for name in sorted(seen.vision):
            digest.update(seen.vision[name].numpy().tobytes())
        found.append(f"{number}:{digest.hexdigest()}")
    return found


def policy_of(encoder: Encoder) -> ImagePolicy:
    """A policy that is not the model's own, where the family has a choice."""
    options = encoder.family.facts.image_options
    if "max_pixels" in options:
        return ImagePolicy(max_pixels=9000)
    if "max_tiles" in options:
        return ImagePolicy(max_tiles=3)
    if options == {"size"}:  # a tower of one size: its square, instead of the middle of the picture
        square = encoder.family.resized(Size(1, 1), ImagePolicy())
        return ImagePolicy(size=(square.height, square.width))
    return ImagePolicy(longest_edge=112) if "longest_edge" in options else ImagePolicy()


@pytest.fixture(scope="module")
def trained(encoder):
    return encoder_of(encoder.family, policy_of(encoder), prompt="Read it.")


@pytest.fixture(scope="module")
def exported(folder, trained, tmp_path_factory):
    """The model as ``merge`` writes it."""
    out = tmp_path_factory.mktemp("exported") / "model"
    out.mkdir()
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    save_model(model, out, family=trained.family, contract=trained.contract, base=folder)
    return out


def test_training_and_asking_see_the_same(trained):
    assert hashes(trained, ask=False) == hashes(trained, ask=True)


def test_the_exported_folder_sees_the_same(trained, exported):
    family = load_family(str(exported))
    contract = Contract.read(exported)
    verify_contract(contract, family, BASE.weights_sha256)
    assert hashes(Encoder(family, contract), ask=True) == hashes(trained, ask=True)


def test_the_exported_processor_alone_sees_the_same(trained, exported):
    """Another engine knows only the folder: its own limits are the trained ones."""
    family = load_family(str(exported))
    settled = family.settle(ImagePolicy())
    other = Encoder(family, trained.contract.model_copy(update={"image": settled}))
    assert hashes(other, ask=True) == hashes(trained, ask=True)


def test_another_policy_does_not(encoder, trained):
    """The control: the hashes see a changed limit."""
    if policy_of(encoder) == ImagePolicy():
        pytest.skip("the family sees every image at one size")
    assert hashes(encoder, ask=True) != hashes(trained, ask=True)

"""Text lines, shapes and worn pages: seeded, in whole tokens, and saying what is drawn."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from vlmtune.quickstart.lines import line_ink, random_line
from vlmtune.quickstart.pictures import placed, worn
from vlmtune.quickstart.shapes import (
    COLOURS,
    SHAPES,
    Scene,
    Shape,
    described,
    draw_scene,
    random_scene,
    reach,
    spans,
)


def lines(seed, count=300):
    rng = random.Random(seed)
    return [random_line(rng, 24) for _ in range(count)]


def test_lines_repeat_with_the_seed_and_hold_the_pieces_of_latex():
    assert lines(1) == lines(1)
    assert lines(1) != lines(2)
    assert all(line == line.strip() and 0 < len(line) <= 24 for line in lines(3))
    text = " ".join(lines(4, 3000))
    for piece in (r"\frac", "{", "}", "^", "_", r"\alpha", r"\left", "0", "Z"):
        assert piece in text


def test_a_line_of_ink_is_wider_the_longer_the_text():
    rng = random.Random(0)
    short, long = (line_ink(text, rng, 20) for text in ("ab", "ab" * 8))
    assert short.max() > 200
    assert long.shape[1] > 3 * short.shape[1]


def test_a_page_is_dark_on_light_in_whole_tokens():
    ink = np.full((20, 61), 255, dtype=np.uint8)
    centred = placed(ink)
    assert centred.shape == (28, 84)
    assert centred[4:24, 11:72].min() == 255
    rng, noise = random.Random(1), np.random.default_rng(1)
    for _ in range(50):
        page = worn(ink, rng, noise)
        assert page.shape[0] % 28 == page.shape[1] % 28 == 0
        assert page.max() - page.min() > 60
        assert np.median(page[:1]) > 150


def test_a_page_repeats_with_its_seeds():
    def page(seed):
        return worn(
            line_ink("x y", random.Random(2), 20), random.Random(seed), np.random.default_rng(3)
        )

    assert np.array_equal(page(5), page(5))
    assert any(not np.array_equal(page(5), page(seed)) for seed in range(6, 12))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_shape_fills_its_box_and_nothing_else(kind):
    box = (30, 40, 70, 80)
    page = draw_scene(Scene(112, 112, (Shape(kind, "red", box),))).astype(int)
    inked = np.abs(page - 255).sum(axis=2) > 60
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert np.abs(np.subtract(found, box)).max() <= 4
    colours = page[inked]
    assert np.abs(np.median(colours, axis=0) - COLOURS["red"]).max() < 40


def test_shapes_are_said_as_they_lie():
    scene = Scene(
        100,
        200,
        (Shape("ring", "orange", (10, 20, 40, 50)), Shape("star", "blue", (60, 30, 90, 60))),
    )
    assert described(scene) == "an orange ring left of a blue star"
    assert spans(scene).startswith(
        "orange ring from 10 across 10 down to 40 across 25 down and blue"
    )
    assert reach(scene.shapes[1], scene) == "left:60 top:15 right:90 bottom:30"


def test_scenes_repeat_and_do_not_overlap():
    first, second = (random_scene(random.Random(3), 3) for _ in range(2))
    assert first == second
    for seed in range(30):
        shapes = random_scene(random.Random(seed), 3).shapes
        assert len({shape.kind for shape in shapes}) == len(shapes)
        for index, shape in enumerate(shapes):
            for other in shapes[:index]:
                left, top = max(shape.box[0], other.box[0]), max(shape.box[1], other.box[1])
                right, bottom = min(shape.box[2], other.box[2]), min(shape.box[3], other.box[3])
                assert right <= left or bottom <= top


def test_lines_and_pages_do_not_hold_a_trainer_up():
    rng, noise = random.Random(0), np.random.default_rng(0)
    started = time.process_time()
    for _ in range(100):
        worn(line_ink(random_line(rng, 24), rng, 22), rng, noise)
    assert 100 / (time.process_time() - started) > 200

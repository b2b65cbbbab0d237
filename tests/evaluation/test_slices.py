import random
from collections import Counter

import pytest

from tiny_rows import asked, picture
from vlmtune.data.conversation import Conversation
from vlmtune.errors import UsageError
from vlmtune.evaluation.intervals import score
from vlmtune.evaluation.run import Prediction, scored
from vlmtune.evaluation.slices import RowFacts, binned, row_facts, slicings, valued

WORDS = [
    "a",
    "cat",
    "sits",
    "on",
    "the",
    "mat",
    "while",
    "dogs",
    "run",
    "far",
    "away",
    "over",
    "green",
    "hills",
]


def evaluated(metric: str, rows: int, seed: int):
    """Captions of which some are right, and what is known of their rows."""
    draw = random.Random(seed)
    truths = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(rows)]
    said = [text if draw.random() < 0.6 else " ".join(draw.choices(WORDS, k=5)) for text in truths]
    predictions = [
        Prediction(str(row), "", text, (truth,), True, 1, 1, {})
        for row, (text, truth) in enumerate(zip(said, truths, strict=True))
    ]
    facts = {
        str(row): RowFacts(truth, draw.choice([None, 100, 2000, 50_000]), {"kind": "abc"[row % 3]})
        for row, truth in enumerate(truths)
    }
    return scored(predictions, [metric], 9), facts


@pytest.mark.parametrize("metric", ["exact_match", "edit_similarity"])
def test_slices_make_up_the_whole(metric):
    """The rows' mean is the mean of the slices, weighted by their rows."""
    evaluation, facts = evaluated(metric, 60, seed=1)
    found = slicings(metric, None, evaluation, facts)
    names = ["Length of the true answer", "Size of the pictures", "meta.kind"]
    assert [each.by for each in found] == names
    for slicing in found:
        assert sum(each.rows for each in slicing.slices) + slicing.left_out == 60
        if slicing.left_out:
            continue
        total = sum(each.rows * each.after.value for each in slicing.slices)
        assert total / 60 == pytest.approx(evaluation.metrics[metric].value)
        fewer = slicing.slices[1:]  # negative control
        total = sum(each.rows * each.after.value for each in fewer)
        assert total / sum(e.rows for e in fewer) != pytest.approx(evaluation.metrics[metric].value)
    without = sum(fact.pixels is None for fact in facts.values())
    assert found[1].left_out == without > 0
    assert all(each.before is None and each.difference is None for each in found[0].slices)


def test_a_slice_knows_the_words_of_the_whole_set():
    """CIDEr weighs words by all references; a slice by itself would weigh them otherwise."""
    evaluation, facts = evaluated("cider", 60, seed=2)
    found = slicings("cider", None, evaluation, facts)[-1]
    total = sum(each.rows * each.after.value for each in found.slices)
    assert total / 60 == pytest.approx(evaluation.metrics["cider"].value)
    first = [row for row in evaluation.predictions if facts[row.id].meta["kind"] == "a"]
    alone = score(["cider"], [r.prediction for r in first], [r.references for r in first])
    assert found.slices[0].after.value != pytest.approx(alone["cider"].value)  # negative control


def test_before_and_after_are_compared_in_each_slice():
    before, _ = evaluated("edit_similarity", 60, seed=3)
    after, facts = evaluated("edit_similarity", 60, seed=4)
    for each in slicings("edit_similarity", before, after, facts)[0].slices:
        gain = each.after.value - each.before.value
        assert each.difference.value == pytest.approx(gain)
    only = slicings("edit_similarity", before, None, facts)[0].slices[0]
    assert (only.after, only.difference) == (None, None)
    assert only.before is not None


def test_columns_that_are_asked_for():
    evaluation, facts = evaluated("exact_match", 12, seed=5)
    (found,) = [
        each
        for each in slicings("exact_match", None, evaluation, facts, ["meta.kind"])
        if each.by.startswith("meta")
    ]
    assert {each.name: each.rows for each in found.slices} == {"a": 4, "b": 4, "c": 4}
    for wrong in ("meta.knid", "kind"):
        with pytest.raises(UsageError, match=f"no evaluated row has the column '{wrong}'.*meta.ki"):
            slicings("exact_match", None, evaluation, facts, [wrong])


def test_equal_numbers_stay_together():
    draw = random.Random(6)
    for _ in range(50):
        values = [draw.choice([None, *range(draw.randint(1, 9))]) for _ in range(40)]
        groups = binned(values, "pixel")
        rows = sorted(row for each in groups.values() for row in each)
        assert rows == [row for row, value in enumerate(values) if value is not None]
        where = {values[row]: name for name, each in groups.items() for row in each}
        assert all(where[values[row]] == name for name, each in groups.items() for row in each)
    assert list(binned([7] * 8, "pixel")) == ["7 pixels"]
    assert list(binned([1, 2000] * 5, "pixel")) == ["1 pixel", "2,000 pixels"]
    assert len(binned(list(range(400)), "pixel")) == 4
    assert [len(each) for each in binned(list(range(400)), "").values()] == [100] * 4
    assert binned([None], "pixel") == {}


def test_values_of_a_column():
    assert list(valued([30, 4, 4, None, 100])) == ["4", "30", "100"]
    assert list(valued([True, False, False])) == ["false", "true"]
    assert list(valued(["x" * 90, " ", "b\nc"])) == ["x" * 59 + "…", "(empty)", "b c"]
    many = valued([letter for n, letter in enumerate("abcdefghijklmnop") for _ in range(40 - n)])
    assert len(many) == 13
    assert list(many)[-1] == "4 other values"
    assert sum(map(len, many.values())) == sum(range(25, 41))
    assert [len(each) for each in valued([n / 7 for n in range(80)]).values()] == [20] * 4


def test_facts_of_a_row_are_read_without_decoding():
    row = asked("q", "a", picture((40, 30)), picture((10, 20)))
    row = Conversation("1", row.messages, row.images, (), {"page": {"kind": "scan", "gone": None}})
    assert row_facts(row, ["an answer"]) == RowFacts("an answer", 1400, {"page.kind": "scan"})
    truncated = asked("q", "a", type(row.images[0])(row.images[0].data[:10]))
    assert row_facts(truncated, []) == RowFacts("", None, {})


def test_few_answers_are_slices_themselves():
    names = Counter({"rust": 30, "mildew": 20, "healthy": 10})
    truths = list(names.elements())
    predictions = [
        Prediction(str(n), "", "rust", (truth,), True, 1, 1, {}) for n, truth in enumerate(truths)
    ]
    facts = {str(n): RowFacts(truth, None, {}) for n, truth in enumerate(truths)}
    (found,) = slicings("accuracy", None, scored(predictions, ["accuracy"], 9), facts)
    assert found.by == "True answer"
    shown = {each.name: (each.rows, each.after.value) for each in found.slices}
    assert shown == {"rust": (30, 1.0), "mildew": (20, 0.0), "healthy": (10, 0.0)}

import numpy as np
import pytest

from vlmtune.errors import DataError, UsageError
from vlmtune.evaluation.intervals import (
    Difference,
    bootstrap,
    compare,
    score,
    score_differences,
    wilson,
)
from vlmtune.evaluation.metric import statistics
from vlmtune.evaluation.metrics import find

SIMILARITY = find("edit_similarity")
CER = find("cer")


def means(values) -> np.ndarray:
    return np.column_stack([values, np.ones(len(values))])


@pytest.mark.parametrize(
    ("successes", "rows", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_the_textbook_s(successes, rows, low, high):
    estimate = wilson(successes, rows)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_no_proportion_is_certain():
    estimate = score(["exact_match"], ["a"] * 64, [["b"]] * 64)["exact_match"]
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert 0.05 < estimate.high < 0.06
    estimate = score(["accuracy"], ["a"] * 64, [["A"]] * 64)["accuracy"]
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert 0.94 < estimate.low < 0.95


@pytest.mark.parametrize("rows", [8, 32, 128])
def test_intervals_hold_the_truth_as_often_as_they_say(rows):
    draw = np.random.default_rng(rows)
    held = wrong = 0
    for seed in range(400):
        estimate = bootstrap(SIMILARITY, means(draw.beta(2, 2, rows)), seed=seed, resamples=400)
        held += estimate.low <= 0.5 <= estimate.high
        wrong += estimate.low <= 0.8 <= estimate.high
    assert 0.92 <= held / 400 <= 0.985
    assert wrong / 400 < 0.2  # negative control: it does not hold everything


def test_a_corpus_metric_is_resampled_as_a_whole():
    draw = np.random.default_rng(5)
    lengths = draw.integers(1, 200, 300)
    stats = np.column_stack([draw.binomial(lengths, 0.1), lengths]).astype(float)
    estimate = bootstrap(CER, stats, seed=0)
    assert estimate.value == stats[:, 0].sum() / stats[:, 1].sum()
    # The delta method's standard error of a ratio.
    residuals = stats[:, 0] - estimate.value * stats[:, 1]
    error = np.sqrt(300) * residuals.std() / stats[:, 1].sum()
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    stats = means(np.random.default_rng(0).random(50))
    assert bootstrap(SIMILARITY, stats, seed=1) == bootstrap(SIMILARITY, stats, seed=1)
    assert bootstrap(SIMILARITY, stats, seed=1) != bootstrap(SIMILARITY, stats, seed=2)


def test_many_rows_are_cut_into_pieces_of_memory():
    stats = means(np.random.default_rng(0).random(90_000))
    estimate = bootstrap(SIMILARITY, stats, seed=0, resamples=100)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.2887 / 300, rel=0.25)


@pytest.mark.parametrize("name", ["edit_similarity", "cer", "bleu", "anls", "exact_match"])
@pytest.mark.parametrize("prediction", ["a b c d e", "a b c d x", "zzzzzzzzzzzzzzzzzzzzzzzz"])
def test_one_row_is_no_certainty(name, prediction):
    estimate = score([name], [prediction], [["a b c d e"]])[name]
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.high - estimate.low > 0.5
    lowest, highest = find(name).range
    assert lowest <= estimate.low
    assert estimate.high <= highest


def test_rows_that_are_all_alike_are_no_certainty():
    perfect = bootstrap(SIMILARITY, means(np.ones(8)), seed=0)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(wilson(8, 8).low)
    no_edits = bootstrap(CER, np.array([[0.0, 10.0]] * 8), seed=0)
    assert (no_edits.low, no_edits.high) == (0.0, pytest.approx(wilson(0, 8).high))


def test_paired_is_narrower_than_unpaired_on_the_same_rows():
    draw = np.random.default_rng(3)
    difficulty = draw.random(200)
    before = means(np.clip(difficulty + draw.normal(0, 0.03, 200), 0, 1))
    after = means(np.clip(difficulty + 0.02 + draw.normal(0, 0.03, 200), 0, 1))
    paired = compare(SIMILARITY, before, after, seed=0)
    assert paired.verdict == "better"
    assert paired.low < paired.value < paired.high
    assert paired.probability > 0.99
    shuffled = compare(SIMILARITY, before, draw.permutation(after), seed=0)
    assert shuffled.value == pytest.approx(paired.value)
    assert shuffled.high - shuffled.low > 3 * (paired.high - paired.low)
    assert shuffled.verdict == "none"  # negative control: pairing is what shows the gain


def test_direction_is_the_metric_s():
    worse = np.array([[4.0, 10.0], [5.0, 10.0]] * 20)
    better = np.array([[1.0, 10.0], [0.0, 10.0]] * 20)
    gain = compare(CER, worse, better, seed=0)
    assert (gain.verdict, gain.probability) == ("better", 1.0)
    assert gain.value < 0
    loss = compare(CER, better, worse, seed=0)
    assert (loss.verdict, loss.probability) == ("worse", 0.0)
    assert compare(SIMILARITY, means(np.ones(9)), means(np.zeros(9)), seed=0).verdict == "worse"


def test_equal_models_differ_by_nothing():
    stats = means(np.random.default_rng(1).random(64))
    same = compare(SIMILARITY, stats, stats, seed=0)
    assert (same.value, same.probability, same.changed, same.verdict) == (0.0, 0.5, 0, "none")
    assert same.low < 0 < same.high


def test_chance_is_seldom_called_a_difference():
    draw = np.random.default_rng(9)
    verdicts = [
        compare(
            SIMILARITY, means(draw.random(40)), means(draw.random(40)), seed=seed, resamples=400
        ).verdict
        for seed in range(200)
    ]
    assert sum(verdict != "none" for verdict in verdicts) <= 20


def test_too_few_changed_rows_support_no_claim():
    five = compare(SIMILARITY, means(np.zeros(5)), means(np.ones(5)), seed=0)
    assert (five.value, five.changed, five.verdict) == (1.0, 5, "none")
    six = compare(SIMILARITY, means(np.zeros(6)), means(np.ones(6)), seed=0)
    assert (six.changed, six.verdict) == (6, "better")
    assert 0 < six.low < six.high == 1.0


def test_score_differences_is_compare_by_name():
    before, after = ["a b", "c", "d"] * 4, ["a b", "x", "y"] * 4
    references = [["a b"], ["x"], ["d"]] * 4
    found = score_differences(["cer", "bleu"], before, after, references, seed=4)
    assert list(found) == ["cer", "bleu"]
    expected = compare(
        CER, statistics(CER, before, references), statistics(CER, after, references), seed=4
    )
    assert found["cer"] == expected
    assert isinstance(expected, Difference)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(DataError, match="0 rows"):
        score(["bleu"], [], [])
    with pytest.raises(DataError, match="0 rows"):
        bootstrap(SIMILARITY, means([]), seed=0)
    with pytest.raises(DataError, match="0 rows"):
        compare(SIMILARITY, means([]), means([]), seed=0)
    with pytest.raises(DataError, match="0 rows"):
        wilson(0, 0)
    with pytest.raises(DataError, match="same rows in the same order"):
        compare(SIMILARITY, means([0.1]), means([0.1, 0.2]), seed=0)
    with pytest.raises(UsageError, match="there is no metric"):
        score(["blue"], ["a"], [["a"]])

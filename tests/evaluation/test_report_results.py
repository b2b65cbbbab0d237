import pytest

from report_samples import BETTER, HIGH, LOW, Page
from vlmtune.evaluation.classes import confusion
from vlmtune.evaluation.intervals import Difference, Estimate
from vlmtune.evaluation.metric import statistics
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.report import report_html
from vlmtune.evaluation.report_content import Answers, ReportContent, ReportRow, headline
from vlmtune.evaluation.report_results import scale_end
from vlmtune.evaluation.report_words import metric_words, probability_words, total_words


def page_of(**changes) -> Page:
    values = {"title": "t", "before": {"cer": LOW}, "after": {"cer": HIGH}, "recipe_yaml": "a: 1"}
    page = Page(report_html(ReportContent(**{**values, **changes})))
    assert (page.strangers, page.open) == ([], [])
    return page


# Words


@pytest.mark.parametrize(
    ("probability", "words"),
    [
        (1.0, "over 99.9 %"),
        (0.9995, "over 99.9 %"),
        (0.999, "99.9 %"),
        (0.5, "50.0 %"),
        (0.0, "under 0.1 %"),
    ],
)
def test_a_probability_is_never_a_certainty(probability, words):
    assert probability_words(probability) == words
    change = Difference(0.3, 0.2, 0.4, probability, 40)
    page = page_of(differences={"cer": change})
    assert f"The probability that it is better after training is {words}." in page.text
    assert f"likely better: {words}" in page.text


def test_too_few_changed_rows_are_given_no_probability():
    text = headline(
        ReportContent(
            title="",
            before={"cer": LOW},
            after={"cer": HIGH},
            differences={"cer": Difference(0.3, 0.2, 0.4, 1.0, 5)},
        )
    )
    assert "probability" not in text
    assert "Only 5 rows" in text


@pytest.mark.parametrize(("changed", "words"), [(0, "0 rows changed"), (1, "1 row changed")])
def test_a_difference_of_too_few_rows_says_how_few(changed, words):
    page = page_of(differences={"cer": Difference(0.0, -0.1, 0.1, 0.5, changed)})
    assert words in page.inside("small")
    assert "likely better" not in page.text


def test_names_of_metrics():
    assert metric_words("box_iou") == "Box IoU"
    assert metric_words("macro_f1") == "Macro F1"
    assert metric_words("caption_bleu_4") == "Caption BLEU 4"
    assert total_words("tokens_per_second", 4145.2) == "4,145 /s"


@pytest.mark.parametrize(("high", "end"), [(0.2, 1.0), (1.0, 1.0), (1.25, 1.5), (7.4, 7.5)])
def test_scales_end_at_halves(high, end):
    assert scale_end([Estimate(0.1, 0.0, high), None]) == end


def test_metrics_stand_in_their_own_order_after_the_primary():
    names = ["cer", "bleu", "exact_match", "edit_similarity"]
    content = ReportContent(title="", after=dict.fromkeys(names, LOW), primary="cer")
    assert content.metrics == ["cer", "exact_match", "edit_similarity", "bleu"]


def test_one_evaluation_alone_has_no_before_and_after():
    rows = [ReportRow(id="1", question="", truth=("a",), after="b", score_after=0.0)]
    page = page_of(before=None, recipe_yaml="", rows=rows)
    assert "Before" not in page.text
    assert "After" not in page.text
    assert "CER is 0.721" in page.text
    assert page.inside("h5") == ["Truth", "Answer"]
    run = page_of(before=None, rows=rows)
    assert "not evaluated before training" in run.text
    assert run.inside("h5") == ["Truth", "After"]


# Answers that were cut


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            Answers(rows=64, cut=3, limit=96),
            "3 of 64 answers (5 %) were cut at the limit of 96 tok",
        ),
        (Answers(rows=64, cut=0, limit=96), "no answer was cut at the limit of 96 tokens."),
        (Answers(rows=2, cut=0, tokens=21), "no answer was cut at the limit, 10 tokens long on av"),
        (Answers(rows=64, remarks=["macro_f1: 3 classes."]), "After: macro_f1: 3 classes."),
    ],
)
def test_what_is_known_of_the_answers_is_said(answers, words):
    assert words in page_of(answers={"after": answers}).text
    assert "Beside the metrics" not in page_of(answers={"after": Answers(rows=3)}).text


def test_a_row_whose_answer_was_cut_says_so():
    row = ReportRow(id="1", question="", truth=("a",), before="b", after="c", score_after=0.1)
    assert "cut at the limit" not in page_of(rows=[row]).text
    cut = ReportRow(id="1", question="", truth=("a",), after="c", score_after=0.1, cut_after=True)
    assert page_of(rows=[cut]).inside("span").count("cut at the limit") == 1


# Classes


def confused(truth, said) -> dict:
    references = [(text,) for text in truth]
    stats = statistics(find("macro_f1"), said, references)
    return confusion(said, references, stats)


def cells(page: Page) -> list[list[str]]:
    """The matrix, line by line; a dot is a zero."""
    source = page.source.partition('class="matrix"')[2].partition("</table>")[0]
    body = source.partition("<tbody>")[2]
    return [Page(line).inside("td") for line in body.split("</tr>") if "<td" in line]


def test_the_matrix_counts_every_row():
    truth = ["cat"] * 5 + ["dog"] * 3 + ["cow"] * 2
    said = ["cat"] * 4 + ["dog", "dog", "dog", "cat", "what?", "cow"]
    page = page_of(answers={"after": Answers(rows=10, confusion=confused(truth, said))})
    assert cells(page) == [
        ["4", "·", "1", "·", "0.800"],  # cat, cow, dog, none of them, recall
        ["·", "1", "·", "1", "0.500"],
        ["1", "·", "2", "·", "0.667"],
    ]
    assert "cow taken for none of the classes: 1 row" in page.text
    assert "Answers after training" in page.text


def test_the_rarest_of_many_classes_are_put_together():
    truth = [f"class {number:02d}" for number in range(30) for _ in range(30 - number)]
    said = ["class 29" if n % 7 == 0 else text for n, text in enumerate(truth)]
    page = page_of(answers={"before": Answers(rows=len(truth), confusion=confused(truth, said))})
    lines = cells(page)
    # 11 classes and the others; none of them; recall, which the others have none of.
    assert [len(line) for line in lines] == [14] * 11 + [13]
    numbers = [int(cell) for line in lines for cell in line[:13] if cell != "·"]
    assert sum(numbers) == len(truth)
    assert "19 others" in page.text
    assert "Answers before training" in page.text


def test_without_classes_there_is_no_matrix():
    assert (
        page_of(answers={"after": Answers(rows=3)}, differences={"cer": BETTER}).of(
            "table", **{"class": "matrix"}
        )
        == []
    )

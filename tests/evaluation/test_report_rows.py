import base64
import io
import random
import re
import time

import pytest
from PIL import Image

from report_samples import HIGH, LOW, Page
from tiny_rows import picture
from vlmtune.errors import ImageError
from vlmtune.evaluation.report import report_html
from vlmtune.evaluation.report_content import ReportContent, ReportRow, ranked
from vlmtune.evaluation.report_pictures import thumbnail
from vlmtune.evaluation.report_texts import LONGEST, differences, faults


def marked(answer: str, *truth: str) -> str:
    """``faults`` with signs for its marks."""
    text = re.sub(r"<del[^>]*>(.*?)</del>", r"-\1-", faults(answer, truth))
    return re.sub(r"<ins[^>]*>(.*?)</ins>", r"+\1+", text)


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("x + y", "x + y", "x + y"),
        ("abcdef", "abXdef", "ab-c-+X+def"),
        ("abcdef", "abdef", "ab-c-def"),
        ("abcdef", "abcXdef", "abc+X+def"),
        ("abc", "abcabc", "abc+abc+"),
        ("one two", "two", "-one -two"),
        ("abc", "xyz", "-abc-+xyz+"),
        ("axbxc", "1x2x3", "-axbxc-+1x2x3+"),  # single characters in common are chance
        ("中文答案", "中文回答", "中文-答案-+回答+"),
    ],
)
def test_exactly_what_differs_is_marked(truth, answer, expected):
    assert marked(answer, truth) == expected


def test_an_answer_is_compared_with_the_closest_truth():
    assert marked("red panda", "dog", "red pandas") == "red panda-s-"
    assert marked("red panda") == "red panda"
    assert '<em class="muted">empty </em>' in faults("", ["dog"])
    assert marked("", "dog").endswith("-dog-")


def test_marks_spell_both_texts():
    draw = random.Random(2)
    for _ in range(300):
        one, other = ("".join(draw.choices("ab {}", k=draw.randint(0, 30))) for _ in range(2))
        runs = differences(one, other)
        assert "".join(missing + same for missing, _, same in runs) == one
        assert "".join(extra + same for _, extra, same in runs) == other


def test_what_is_too_long_to_compare_is_said():
    truth = "abcdefghij" * 200
    assert "compared" not in faults(truth[:LONGEST], [truth[:LONGEST]])
    for answer in (truth[:LONGEST], truth + "x"):
        words = f"the answer has {len(answer):,}, the truth 2,000"
        assert words in faults(answer, [truth])


def test_a_model_that_repeats_itself_does_not_hold_up_the_report():
    began = time.perf_counter()
    for answer, truth in (("{ " * 600, "{ a }" * 240), ("a" * LONGEST, "a b " * 300)):
        faults(answer, [truth])
    assert time.perf_counter() - began < 0.5  # difflib: 8 s


def test_rows_are_ranked_by_the_metric_s_direction():
    rows = [
        ReportRow(id=f"{score}", question="", truth=("a",), after="b", score_after=score)
        for score in (0.5, 0.1, 0.9, 0.3, 0.7)
    ]
    for metric, first in (("edit_similarity", "0.1"), ("cer", "0.9")):
        worst, best = ranked(ReportContent(title="", rows=rows, after={metric: HIGH}), 2)
        assert worst[0].id == first
        assert len({row.id for row in worst + best}) == 4


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_thumbnails_are_upright_and_bounded_and_tell_nothing_else():
    sideways = Image.new("RGB", (1500, 300), "red")
    sideways.paste("blue", (0, 0, 750, 300))  # left half
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "private"
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        extra = {"comment": b"private"} if kind == "JPEG" else {}
        sideways.save(file, kind, exif=exif, icc_profile=b"private" * 40, **extra)
        shown = decoded(thumbnail(file.getvalue())[0])
        assert shown.size == (192, 960)
        assert shown.convert("RGB").getpixel((96, 10)) >= (0, 0, 200)  # left became top
        assert shown.convert("RGB").getpixel((96, 950))[0] > 200
        assert not shown.info.keys() & {"exif", "icc_profile", "comment"}
    noise, size, original = thumbnail(picture((900, 400)).data)
    assert noise.startswith("data:image/jpeg")
    assert decoded(noise).size == size == (640, 284)
    assert original == (900, 400)
    small = picture((31, 17), colour="red")
    assert decoded(thumbnail(small.data)[0]).size == (31, 17)
    with pytest.raises(ImageError):
        thumbnail(b"no picture")


def test_a_picture_that_cannot_be_opened_is_said_so():
    row = ReportRow(
        id="1",
        question="q",
        truth=("a",),
        after="a",
        score_after=1.0,
        images=[b"broken"],
        pictures=1,
    )
    page = Page(report_html(ReportContent(title="", rows=[row], after={"cer": LOW})))
    assert "The picture cannot be shown (image_" in page.text
    assert not page.of("img")


def test_at_most_forty_rows_are_shown_and_none_twice():
    rows = [
        ReportRow(id=f"row {n}", question="", truth=("a",), after="a", score_after=n / 100)
        for n in range(100)
    ]
    page = Page(report_html(ReportContent(title="", rows=rows, after={"exact_match": LOW})))
    shown = page.inside("h4")
    assert len(shown) == len(set(shown)) == 2 * 20
    assert shown[:2] == ["row 0", "row 1"]
    assert shown[20:22] == ["row 99", "row 98"]

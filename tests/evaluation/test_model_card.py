from dataclasses import replace

import pytest
import yaml
from markdown_it import MarkdownIt

from report_samples import BETTER, HIDDEN, HIGH, LOW, PAYLOADS, Page, filled, outside, spelled
from vlmtune.evaluation import model_card as cards
from vlmtune.evaluation.model_card import model_card, plain, write_model_card
from vlmtune.evaluation.report_content import ReportContent, headline

ELEMENTS = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def rendered(card: str) -> Page:
    """The card below its front matter, as a hub shows it: Markdown with HTML and tables."""
    body = card.partition("\n---\n")[2]
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Page(markdown.render(body))


def rows_of(page: Page) -> list[int]:
    """Cells of each table row."""
    counts: list[int] = []
    for tag, _ in page.elements:
        if tag == "tr":
            counts.append(0)
        elif tag in ("td", "th"):
            counts[-1] += 1
    return counts


def complaints(card: str, text: str) -> list[str]:
    """What is wrong with the card of ``filled(text)``."""
    matter = front_matter(card)
    found = [] if matter.keys() <= {"library_name", "pipeline_tag", "tags"} else [str(matter)]
    page, harmless = rendered(card), rendered(model_card(filled("word")))
    found += page.strangers
    found += [f"{tag} is open" for tag in page.open]
    found += [tag for tag, _ in page.elements if tag not in ELEMENTS]
    found += ["other elements"] if page.shapes != harmless.shapes else []
    found += ["other cells"] if rows_of(page) != rows_of(harmless) else []
    found += [f"character {character!a}" for character in HIDDEN.findall(card)]
    for tag, attributes in page.elements:
        found += outside(tag, attributes)
    line = " ".join(text.split())
    wanted = [f"title {line}", f"environment key {line}", f"data {line}", f"contract {line}"]
    wanted += [f"recipe {spelled(text)}", f"reproduce {spelled(text)}"]
    shown = page.text
    return found + [f"{want!a} is not there" for want in wanted if spelled(want) not in shown]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_field_can_say_more_than_its_text(payload):
    # On one line, spaces of any kind become one: to Python these are spaces.
    shown = payload.translate(dict.fromkeys((0x2028, 0x2029, 0x0D, 0x85), " ")).strip()
    assert complaints(model_card(filled(shown)), shown) == []
    card = model_card(filled(payload))
    assert HIDDEN.findall(card) == []
    card.encode("utf-8")


def test_without_escaping_they_would_say_more(monkeypatch):
    """Negative control of the test above; what Markdown itself takes for text is not counted."""
    monkeypatch.setattr(cards, "plain", lambda text: " ".join(text.split()))
    monkeypatch.setattr(cards, "_fenced", lambda title, text, _: f"## {title}\n\n```\n{text}\n```")
    caught = [text for text in PAYLOADS if complaints(model_card(filled(text)), text)]
    assert len(caught) >= 30
    for text in ("<img src=x onerror=alert(1)>", "| a | b |\\| c |", "lone \ud800 surrogate"):
        assert text in caught


def test_escaped_pipes_stay_in_their_cell():
    page = rendered(model_card(ReportContent(title="run", data={"a|b": "c | d \\| e"})))
    assert page.inside("td") == ["a|b", "c | d \\| e"]
    assert plain("| `x` <b>") == "\\| \\`x\\` &lt;b&gt;"


def test_no_fence_ends_before_its_text(monkeypatch):
    text = "a: |\n  ```\n  # no heading\n  ````\n---\nbase_model: evil/evil"
    card = model_card(ReportContent(title="run", recipe_yaml=text, base_model="Qwen/Qwen2-VL"))
    page = rendered(card)
    assert text + "\n" in page.inside("code")
    assert page.inside("h1") == ["run"]
    assert front_matter(card)["base_model"] == "Qwen/Qwen2-VL"
    monkeypatch.setattr(cards, "_fenced", lambda title, text, _: f"## {title}\n\n```\n{text}\n```")
    card = model_card(ReportContent(title="run", recipe_yaml=text))
    assert rendered(card).inside("h1") == ["run", "no heading"]  # negative control


@pytest.mark.parametrize(
    ("base", "method", "expected"),
    [
        ("Qwen/Qwen2-VL-2B", "lora", ("Qwen/Qwen2-VL-2B", "adapter", "peft")),
        ("Qwen/Qwen2-VL-2B", "full", ("Qwen/Qwen2-VL-2B", "finetune", "transformers")),
        ("/home/somebody/models/base", "lora", (None, None, "peft")),
        ("models/private/base", "lora", (None, None, "peft")),
        ("org/name\nlicense: mit", "lora", (None, None, "peft")),
        ("../base", "full", (None, None, "transformers")),
        ("", "lora", (None, None, "peft")),
    ],
)
def test_the_front_matter_is_what_a_hub_reads(base, method, expected):
    matter = front_matter(model_card(ReportContent(title="x", base_model=base, method=method)))
    names = ("base_model", "base_model_relation", "library_name")
    assert tuple(matter.get(name) for name in names) == expected
    assert matter["pipeline_tag"] == "image-text-to-text"
    assert matter["tags"] == ["vlmtune", "vision-language-model", method]
    assert "license" not in matter
    if expected[0] is None:
        assert "base_model" not in matter


def test_results_are_a_table_with_what_may_be_claimed():
    content = ReportContent(
        title="run",
        before={"cer": LOW, "bleu": LOW},
        after={"cer": HIGH, "bleu": HIGH},
        differences={"bleu": BETTER},
        primary="bleu",
    )
    page = rendered(model_card(content))
    assert headline(content) in page.inside("p")
    assert page.inside("td") == [
        *("BLEU", "0.411 [0.350, 0.470]", "0.721 [0.660, 0.770]", "+0.310 [0.250, 0.370]"),
        *("CER", "0.411 [0.350, 0.470]", "0.721 [0.660, 0.770]", "–"),
    ]


def test_how_to_use_tells_no_single_row_s_question():
    content = filled("word")
    assert "question word" in model_card(content)  # all rows share it: it is the task
    first, second = content.rows
    other = replace(content, rows=[first, replace(second, question="what is my name?")])
    for rows in (other.rows, [first]):
        card = model_card(replace(content, rows=rows))
        assert "question word" not in card
        assert "--prompt 'your question'" in card
    quoted = replace(
        content, rows=[replace(row, question="it's; rm -rf /") for row in (first, second)]
    )
    assert """--prompt 'it'"'"'s; rm -rf /'""" in model_card(quoted)


def test_a_merge_is_offered_for_adapters_alone():
    assert "vlmtune merge" in model_card(ReportContent(title="x", method="lora"))
    assert "vlmtune merge" not in model_card(ReportContent(title="x", method="full"))


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write_model_card(tmp_path / "README.md", filled("word"))
    assert (tmp_path / "README.md").read_bytes() == model_card(filled("word")).encode()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]

"""The documentation says what is true: commands exist and run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.testing import CliRunner

from vlmtune.cli.main import app
from vlmtune.formulas import write_formula_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = typer.main.get_command(app)


def commands(page: Path) -> list[list[str]]:
    """Every ``vlmtune …`` command in a page's shell blocks and inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words and words[0] == "vlmtune"]


def fault(words: list[str]) -> str:
    """What is wrong with a command line; empty if the real command would take it."""
    command, rest = COMMAND, list(words)
    try:
        while isinstance(command, TyperGroup):
            name, *rest = rest
            found = command.commands.get(name)
            if found is None:
                return f"there is no verb {name!r}"
            command = found
        command.make_context(command.name, rest)
    except TyperException as error:
        return str(error.format_message())
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    for words in commands(page):
        assert fault(words) == "", f"{page.name}: vlmtune {shlex.join(words)}"


def test_wrong_commands_are_caught():
    assert "no verb" in fault(["prepaer", "x"])
    assert "--validatoin" in fault(["prepare", "x.csv", "--out", "d", "--validatoin", "3"])
    assert fault(["merge", "run"]) != ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in names, f"{page.name}: {target}"


def test_every_verb_has_a_page():
    assert isinstance(COMMAND, TyperGroup)
    for name in COMMAND.commands:
        assert (ROOT / "docs" / f"{name}.md").exists(), name


def test_the_generated_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.PAGES) == {"recipe.md", "families.md"}
    for name, page in module.PAGES.items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == page(), f"{name}: run: python docs/generate.py"


def test_readme_runs(tmp_path, tiny_base, monkeypatch):
    """The README's own commands, on a tiny model and rendered formulas."""
    monkeypatch.chdir(tmp_path)
    table = write_formula_table(tmp_path, 20, seed=5)
    (tmp_path / "formula.png").write_bytes((tmp_path / "images" / "000000.png").read_bytes())
    assert table == tmp_path / "formulas.csv"
    small = [
        f"model.base={tiny_base}",
        "training.precision=fp32",
        "training.max_steps=1",
        "training.gradient_checkpointing=false",
        "evaluation.max_new_tokens=4",
    ]
    ran = []
    for words in commands(ROOT / "README.md"):
        if words[0] in ("prepare", "train", "predict", "merge"):
            extra = small if words[0] == "train" else []
            done = CliRunner().invoke(app, [*words, *extra])
            assert done.exit_code == 0, (words, done.output)
            ran.append(words[0])
    assert ran == ["prepare", "train", "predict", "merge"]
    assert (tmp_path / "runs" / "latex-ocr" / "report.html").exists()

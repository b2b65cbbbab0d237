"""The shape of the code: who may import whom, how long a file may be, what may not appear in it.

Each rule is a function from source text to complaints, so that it can be shown a bad snippet.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlmtune.errors import RecipeError
from vlmtune.recipe import load_recipe

SOURCE = Path(__file__).resolve().parents[1] / "src" / "vlmtune"

# In the order data flows; a module imports only from its own part and from those above it.
LAYERS = (
    ("errors",),
    ("config",),
    ("files", "garbage"),
    ("fetch", "hub"),
    ("formulas",),
    ("data",),
    ("models",),
    ("testing",),
    ("batching",),
    ("tuning",),
    ("runs",),
    ("evaluation",),
    ("training",),
    ("forecast",),
    ("checking",),
    ("serving",),
    ("quickstart",),
    ("recipe",),
    ("verbs",),
    ("api",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

# Model types and the first parts of class names. "llava" and "qwen" are also names of data formats.
FAMILY_TYPE = re.compile(
    r"qwen2_vl|qwen2_5_vl|qwen3_vl|qwen_vl|idefics[23]|smolvlm|gemma3|internvl|paligemma"
    r"|llava_next|llava_onevision"
)
FAMILY_CLASS = re.compile(r"(Qwen2VL|Qwen2_5_VL|Qwen3VL|Idefics[23]|SmolVLM|Llava|Gemma3|InternVL)")
MAY_NAME_FAMILIES = ("models", "testing")
MAY_READ_ENVIRONMENT = ("recipe", "hub", "cli", "training.distributed", "models.products")
MAY_OPEN_URLS = ("fetch", "hub")
NETWORK = re.compile(
    r"(socket|ssl|http\.client|urllib\.request|urllib3|requests|httpx2?|aiohttp|ftplib)(\.|$)"
)
MAX_LINES = 400
PROBES_PER_LINE = 1 / 1000

Check = Callable[[str, str], Iterator[str]]


def part_of(module: str) -> str:
    return module.split(".")[0]


def modules() -> dict[str, str]:
    """Dotted name below ``vlmtune`` -> source text; packages without ``__init__``."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
        found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def import_direction(module: str, source: str) -> Iterator[str]:
    own = part_of(module)
    if own not in RANK:
        yield f"{module}: the part {own!r} has no place in LAYERS"
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{module}:{node.lineno} imports relatively"
            continue
        for target in _imported(node):
            part = part_of(target)
            if part not in RANK:
                yield f"{module}:{node.lineno} imports vlmtune.{target}, which has no place"
            elif part != own and RANK[part] >= RANK[own]:
                yield f"{module}:{node.lineno} imports vlmtune.{target}, which stands below it"


def _imported(node: ast.AST) -> Iterator[str]:
    """Names below ``vlmtune`` that a statement takes; its version is anybody's."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name != "vlmtune"]
    elif isinstance(node, ast.ImportFrom) and node.module == "vlmtune":
        names = [f"vlmtune.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        names = [f"{node.value.id}.{node.attr}"]  # after a plain "import vlmtune"
    for name in names:
        if name.startswith("vlmtune.") and name != "vlmtune.__version__":
            yield name.removeprefix("vlmtune.")


def file_length(module: str, source: str) -> Iterator[str]:
    if (lines := source.count("\n")) > MAX_LINES:
        yield f"{module} has {lines} lines; at most {MAX_LINES}"


def family_names(module: str, source: str) -> Iterator[str]:
    if part_of(module) in MAY_NAME_FAMILIES:
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if FAMILY_TYPE.fullmatch(node.value) or FAMILY_CLASS.match(node.value):
            yield f"{module}:{node.lineno} names the family {node.value!r}"


def environment(module: str, source: str) -> Iterator[str]:
    if any(module == name or module.startswith(f"{name}.") for name in MAY_READ_ENVIRONMENT):
        return
    for node in ast.walk(ast.parse(source)):
        attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        if attribute and isinstance(node.value, ast.Name) and node.value.id == "os":
            yield f"{module}:{node.lineno} reads the environment"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ("environ", "getenv"):
                    yield f"{module}:{node.lineno} reads the environment"


def network(module: str, source: str) -> Iterator[str]:
    if part_of(module) in MAY_OPEN_URLS:
        return
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if NETWORK.match(name):
                yield f"{module}:{node.lineno} imports {name}; URLs are opened by vlmtune.fetch"


def unfinished(module: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield f"{module}:{node.lineno} is not implemented"


def probes(module: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("hasattr", "getattr"):
            yield f"{module}:{node.lineno} probes with {called.id}"


CHECKS: tuple[Check, ...] = (
    import_direction,
    file_length,
    family_names,
    environment,
    network,
    unfinished,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source(check):
    assert [text for name, source in modules().items() for text in check(name, source)] == []


def test_probing_is_rare():
    sources = modules()
    found = [text for name, source in sources.items() for text in probes(name, source)]
    assert len(found) <= sum(s.count("\n") for s in sources.values()) * PROBES_PER_LINE, found


def test_the_sources_are_found():
    assert {"errors", "config", "hub", "data.conversation"} <= modules().keys()


BAD = [
    (import_direction, "data.rows", "from vlmtune.training.loop import train"),
    (import_direction, "data.rows", "import vlmtune.models.load"),
    (import_direction, "data.rows", "from vlmtune import models"),
    (import_direction, "data.rows", "from vlmtune import train"),
    (import_direction, "data.rows", "import vlmtune\nvlmtune.train('r.yaml')"),
    (import_direction, "data.rows", "from .formats import read"),
    (import_direction, "fetch", "import vlmtune.hub"),
    (import_direction, "data.rows", "if TYPE_CHECKING:\n    from vlmtune.runs.folder import Run"),
    (import_direction, "data.rows", "def later():\n    from vlmtune.cli import main"),
    (import_direction, "helpers", "import os"),
    (import_direction, "data.rows", "from vlmtune.helpers import f"),
    (file_length, "data.rows", "x = 1\n" * 401),
    (family_names, "training.loop", "if family == 'qwen2_vl': pass"),
    (family_names, "training.loop", "cls = 'Idefics2ForConditionalGeneration'"),
    (environment, "training.loop", "import os\nrank = os.environ['RANK']"),
    (environment, "training.loop", "import os\nrank = os.getenv('RANK')"),
    (environment, "training.loop", "from os import environ"),
    (network, "data.files", "import urllib.request"),
    (network, "data.files", "from urllib import request"),
    (network, "data.files", "from urllib.request import urlopen"),
    (network, "data.files", "from http import client"),
    (network, "serving.engine", "def f():\n    import requests.sessions"),
    (network, "serving.engine", "import httpx2 as web"),
    (network, "serving.engine", "from socket import create_connection"),
    (unfinished, "training.loop", "def f():\n    raise NotImplementedError('later')"),
    (probes, "training.loop", "if hasattr(model, 'visual'): pass"),
    (probes, "training.loop", "x = getattr(model, 'visual', None)"),
]


@pytest.mark.parametrize(("check", "module", "snippet"), BAD)
def test_a_bad_snippet_is_seen(check, module, snippet):
    assert list(check(module, snippet))


GOOD = [
    (import_direction, "data.rows", "from vlmtune.errors import RowError\nimport vlmtune.fetch"),
    (import_direction, "data.rows", "from vlmtune.data.formats import read"),
    (import_direction, "data.rows", "import vlmtune\nversion = vlmtune.__version__"),
    (import_direction, "cli.main", "from vlmtune import __version__, api"),
    (family_names, "models.qwen2_vl", "TYPES = ('qwen2_vl',)"),
    (family_names, "data.formats", "'as Qwen-VL writes it: llava, qwen'"),
    (environment, "training.distributed", "import os\nrank = os.environ['RANK']"),
    (network, "fetch.network", "import socket"),
    (network, "data.files", "from urllib.parse import urlsplit\nfrom http import HTTPStatus"),
]


@pytest.mark.parametrize(("check", "module", "snippet"), GOOD)
def test_a_good_snippet_is_not(check, module, snippet):
    assert list(check(module, snippet)) == []


# Recipes


def shipped() -> list[Path]:
    return sorted((SOURCE / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_a_shipped_recipe_parses(path):
    load_recipe(path)


def test_a_bad_recipe_does_not(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("training: {bach_size: 4}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="bach_size"):
        load_recipe(bad)

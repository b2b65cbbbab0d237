"""``predict`` opens a URL only where it was told that it may."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlmtune.cli.main import app
from vlmtune.errors import FetchError, UsageError
from vlmtune.verbs import predict as verb
from websites import Canaries, closing_all


@pytest.fixture
def canaries():
    found = Canaries()
    with closing_all(found):
        yield found


@pytest.mark.parametrize("scheme", ["http", "HTTPS", "ftp", "file"])
def test_a_url_needs_the_flag(scheme, canaries, monkeypatch):
    monkeypatch.setattr(verb, "fetch_image_bytes", pytest.fail)
    url = f"{scheme}://user:secret@127.0.0.1:{canaries.port}/f.png?key=secret"
    with pytest.raises(UsageError, match="--allow-urls") as caught:
        verb.predict("no model is opened", [url], "What is this?")
    assert "secret" not in str(caught.value)
    assert canaries.hits() == 0


def test_the_flag_opens_nothing_private(canaries):
    url = f"http://127.0.0.1:{canaries.port}/f.png"
    with pytest.raises(FetchError):
        verb.predict("no model is opened", [url], "What is this?", allow_urls=True)
    with pytest.raises(FetchError, match="not on the public"):
        verb.predict("no model is opened", ["http://127.0.0.1/"], "What?", allow_urls=True)
    assert canaries.hits() == 0


@pytest.mark.parametrize(
    ("flags", "status", "code"), [([], 2, "usage"), (["--allow-urls"], 1, "url_not_allowed")]
)
def test_on_the_command_line(flags, status, code):
    arguments = ["predict", "nobody/none", "--image", "http://169.254.169.254/", "--json", *flags]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert error["code"] == code
    assert "169.254.169.254" in error["message"]


def test_the_fetched_image_is_answered_about(tiny_base, tmp_path, monkeypatch):
    """The same answer as to the same bytes in a file."""
    from PIL import Image

    file = tmp_path / "f.png"
    Image.linear_gradient("L").resize((56, 56)).save(file)
    asked = []
    monkeypatch.setattr(
        verb, "fetch_image_bytes", lambda url: asked.append(url) or file.read_bytes()
    )
    url = "https://example.org/f.png"
    answers = [
        verb.predict(tiny_base, [image], "What is this?", max_new_tokens=4, allow_urls=True)
        for image in (url, str(file))
    ]
    assert asked == [url]
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["tokens"] == answers[1]["tokens"]

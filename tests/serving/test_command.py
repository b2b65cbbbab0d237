"""``vlmtune serve`` before it serves: what it refuses, and what it warns of."""

from __future__ import annotations

import json
import logging
import socket
import sys

import pytest
from typer.testing import CliRunner

from vlmtune.cli.main import app
from vlmtune.cli.serve import named_paths
from vlmtune.errors import MissingExtraError, UsageError
from vlmtune.serving.server import check_port, is_loopback
from vlmtune.verbs import serve as verb


def error(*arguments):
    done = CliRunner().invoke(app, ["serve", *map(str, arguments), "--json"])
    assert done.exit_code == 2, done.output
    return json.loads(done.stdout)["error"]


def test_wrong_options(folder, tmp_path):
    assert "expected NAME=PATH" in error(folder, "--adapter", "runs/latex")["message"]
    assert "given twice" in error(folder, "--adapter", "a=b", "--adapter", "a=c")["message"]
    assert "neither an existing folder" in error(tmp_path / "none", "--port", 0)["message"]
    assert "cannot be read" in error(folder, "--api-key-file", tmp_path / "none")["message"]
    (tmp_path / "keys").write_text("# none\n\n", encoding="utf-8")
    assert "holds no key" in error(folder, "--api-key-file", tmp_path / "keys")["message"]
    assert named_paths(["a=b=c", "d=e"]) == {"a": "b=c", "d": "e"}


def test_a_port_that_is_taken_is_found_before_loading(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="--port"):
            check_port("127.0.0.1", port)
        assert "--port" in error(tmp_path, "--port", port)["message"]
    check_port("127.0.0.1", port)
    with pytest.raises(UsageError):
        check_port("192.0.2.1", 0)


def test_without_its_packages(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "vlmtune.serving.openai_api", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtraError, match=r"vlmtune\[serve\]"):
        verb.serve(folder)


def test_keys_that_others_may_read_and_open_doors_are_told(tmp_path, caplog, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("one\n", encoding="utf-8")
    keys.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert verb.read_keys(keys) == ("one",)
    assert "chmod 600" in caplog.text
    caplog.clear()
    keys.chmod(0o600)
    monkeypatch.setattr(verb, "open_served", lambda *_, **__: 1 / 0)
    for options, warned in (
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key_file": keys}, False),
        ({}, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
            verb.serve("model", port=0, **options)
        assert ("everybody who reaches" in caplog.text) is warned


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))

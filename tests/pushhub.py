"""A hub on this computer that takes what huggingface_hub and modelscope_hub push, and serves it.

Uploads go as to the real ones: a repository is made, large files are announced, sent with their
sha256 checked (whole or in parts), and a commit names everything. It can damage what it is sent on
the way, keep something else than it was sent, and refuse.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from fakehub import FakeHub, Repository

TOKEN = "hf_" + "s3cr3t" * 6
LARGE = (".safetensors", ".bin", ".parquet")
Answer = tuple[int, Any]


@dataclass
class PushHub(FakeHub):
    """A hub that also takes pushes, from the owner ``owner`` with ``TOKEN``.

    Attributes:
        private: Names of private repositories, as in ``repositories``.
        part_bytes: Larger files are asked for in parts of that size.
        damage: What happens to the bytes of large files on their way here.
        forge: What is kept of files instead of what was sent, without a word.
        refuse: Status with which sending to these paths (their beginnings) is refused.
        commits: Messages of all commits.
    """

    private: set[str] = field(default_factory=set)
    part_bytes: int | None = None
    damage: bool = False
    forge: set[str] = field(default_factory=set)
    refuse: dict[str, int] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    # Reading

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        me = {"name": "owner", "type": "user", "orgs": [], "username": "owner"}
        if path in ("api/whoami-v2", "openapi/v1/users/me"):
            self.requests.append(f"{request.command} {path}")
            if not self._knows(request):
                self._reply(request, 401, {"error": "Invalid credentials", "Message": "who?"})
            else:
                self._reply(request, 200, me if path.startswith("api") else {"data": me})
            return
        if any(name in path for name in self.private) and not self._knows(request):
            self._reply(request, 401, {"error": "not found"})
            return
        super().answer(request, body=body)

    def _huggingface_api(
        self, path: str, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        status, headers, content = super()._huggingface_api(path, query)
        if content.startswith(b'{"id"'):
            shown = json.loads(content)
            shown["private"] = any(path.startswith(name) for name in self.private)
            content = json.dumps(shown).encode()
        return status, headers, content

    def _modelscope(
        self, path: str, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        status, headers, content = super()._modelscope(path, query)
        answer = json.loads(content) if content.startswith(b'{"Code"') else {}
        if answer.get("Data", {}).get("Name") == path:
            answer["Data"] = {"Name": path, "Visibility": 1 if path in self.private else 5}
            answer["data"] = {"visibility": "private" if path in self.private else "public"}
            content = json.dumps(answer).encode()
        return status, headers, content

    # Taking

    def take(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.requests.append(f"{request.command} {path}")
        sent = b"".join(_body(request))
        for beginning, status in self.refuse.items():
            if path.startswith(beginning):
                said = {"error": f"no, {TOKEN} may not", "Message": "no", "Success": False}
                self._reply(request, status, said)
                return
        if path.startswith("blobs/"):
            query = parse_qs(urlsplit(request.path).query)
            self._take_blob(request, path.removeprefix("blobs/"), query, sent)
            return
        if not self._knows(request):
            self._reply(request, 401, {"error": "Invalid credentials", "Message": "who?"})
            return
        lines = [json.loads(line) for line in sent.splitlines()]  # a commit has several
        self._reply(request, *self._taken(path, lines))

    def _taken(self, path: str, lines: list[dict[str, Any]]) -> Answer:
        value = lines[0]
        if path == "api/repos/create":
            return self._make(value["organization"], value["name"], value.get("visibility"))
        if path == "api/validate-yaml":
            return _checked(value["content"])
        if path == "api/v1/models":
            visibility = "private" if value["Visibility"] == 1 else "public"
            status, made = self._make(value["Path"], value["Name"], visibility)
            return status, {"Code": status, "Success": status == 200, "Data": made}
        if path.endswith("info/lfs/objects/batch"):
            objects = [self._announced(each) for each in value["objects"]]
            shown = {"transfer": "basic", "objects": objects}
            return 200, {"Code": 200, "Data": shown} if path.startswith("api/v1") else shown
        if path.startswith("api/v1/repos/models/"):
            return self._commit_modelscope(path.removeprefix("api/v1/repos/"), value)
        name, _, verb = path.removeprefix("api/").partition("/preupload/")
        if verb:
            files = [self._mode(name, each) for each in value["files"]]
            return 200, {"files": files}
        name, _, verb = path.removeprefix("api/").partition("/commit/")
        if verb:
            return self._commit_huggingface(name, lines)
        return 404, {"error": f"{path}?"}

    def _make(self, owner: str | None, name: str, visibility: str | None) -> Answer:
        full = f"models/{owner}/{name}"
        if owner != "owner":
            return 403, {"error": f"You don't have the rights to create under {owner}"}
        if full in self.repositories:
            shown = {"error": "You already created this model repo"}
            return 409, {**shown, "url": f"{self.endpoint}/{owner}/{name}"}
        self.repositories[full] = Repository({".gitattributes": b"*.safetensors lfs\n"})
        if visibility == "private":
            self.private.add(full)
        return 200, {"url": f"{self.endpoint}/{owner}/{name}", "Path": owner, "Name": name}

    def _mode(self, name: str, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(LARGE)
        held = self.repositories[name].files.get(file["path"])
        oid = None
        if held is not None:
            header = b"" if large else f"blob {len(held)}\0".encode()
            digest = hashlib.sha256 if large else hashlib.sha1
            oid = digest(header + held).hexdigest()
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _announced(self, file: dict[str, Any]) -> dict[str, Any]:
        oid, size = file["oid"], file["size"]
        if oid in self.blobs:
            return {"oid": oid, "size": size}  # nothing needs to be sent
        href = f"{self.endpoint}/blobs/{oid}"
        header: dict[str, str] = {}
        if self.part_bytes and size > self.part_bytes:
            count = -(-size // self.part_bytes)
            header = {str(part): f"{href}?part={part}" for part in range(1, count + 1)}
            header["chunk_size"] = str(self.part_bytes)
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}}}

    def _take_blob(
        self, request: BaseHTTPRequestHandler, oid: str, query: dict[str, list[str]], sent: bytes
    ) -> None:
        if self.damage and request.command == "PUT":
            sent = bytes([sent[0] ^ 1]) + sent[1:]
        if "part" in query:
            self.parts.setdefault(oid, {})[int(query["part"][0])] = sent
            self._reply(request, 200, {}, ETag=hashlib.md5(sent).hexdigest())
            return
        if request.command == "POST":  # all parts are here
            asked = [part["partNumber"] for part in json.loads(sent)["parts"]]
            held = self.parts.pop(oid)
            sent = b"".join(held[number] for number in asked)
        if hashlib.sha256(sent).hexdigest() != oid:
            self._reply(request, 400, {"error": "sha256 of the content differs", "Code": 400})
            return
        self.blobs[oid] = sent
        self._reply(request, 200, {})

    def _commit_huggingface(self, name: str, lines: list[dict[str, Any]]) -> Answer:
        header, *operations = lines
        assert header["key"] == "header"
        files = dict(self.repositories[name].files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif operation["key"] == "lfsFile":
                if len(self.blobs.get(value["oid"], b"")) != value["size"]:
                    return 400, {"error": f"{value['path']} was never sent"}
                files[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"{operation['key']}?"}
        commit = self._committed(name, files, header["value"]["summary"])
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit}

    def _commit_modelscope(self, path: str, value: dict[str, Any]) -> Answer:
        name = path.partition("/commit/")[0]
        files = dict(self.repositories[name].files)
        for action in value["actions"]:
            if action["action"] == "delete":
                del files[action["path"]]
            elif action["type"] == "lfs":
                files[action["path"]] = self.blobs[action["sha256"]]
            else:
                files[action["path"]] = base64.b64decode(action["content"], validate=True)
        commit = self._committed(name, files, value["commit_message"])
        return 200, {"Code": 200, "Success": True, "Data": {"CommitId": commit}}

    def _committed(self, name: str, files: dict[str, bytes], message: str) -> str:
        for forged in self.forge & files.keys():
            files[forged] = files[forged][::-1]
        self.commits.append(message)
        tree = [hashlib.sha1(path.encode() + files[path]).hexdigest() for path in sorted(files)]
        commit = hashlib.sha1(" ".join([*self.commits, *tree]).encode()).hexdigest()
        self.repositories[name] = Repository(files, commit)
        return commit

    def _knows(self, request: BaseHTTPRequestHandler) -> bool:
        return TOKEN in (request.headers.get("Authorization") or "")

    def _reply(
        self, request: BaseHTTPRequestHandler, status: int, value: Any, **headers: str
    ) -> None:
        content = json.dumps(value).encode()
        request.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        if status == 401:
            headers["X-Error-Message"] = "Invalid credentials in Authorization header"
        for key, text in headers.items():
            request.send_header(key, text)
        request.end_headers()
        request.wfile.write(content)


def _checked(card: str) -> Answer:
    """The metadata of a model card, checked as the hub does before any file is sent."""
    head = card.split("\n---\n")[0].removeprefix("---\n")
    try:
        matter = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    relation = matter.get("base_model_relation")
    if relation not in (None, "adapter", "merge", "quantized", "finetune"):
        return 400, {"errors": [{"message": f"base_model_relation {relation}"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}


def _body(request: BaseHTTPRequestHandler) -> Iterator[bytes]:
    if request.headers.get("Transfer-Encoding") != "chunked":
        yield request.rfile.read(int(request.headers.get("Content-Length") or 0))
        return
    while size := int(request.rfile.readline(), 16):
        yield request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()


@contextmanager
def reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    """A hub that the hubs' libraries take for theirs, with ``TOKEN`` logged in."""
    import huggingface_hub.constants

    fake = PushHub()
    fake.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    # The chunk store of the real hub speaks a protocol of its own; without it files go by LFS.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.endpoint)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(cache / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(cache / "modelscope_home"))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    if importlib.util.find_spec("modelscope_hub") is not None:
        for name in ("BLOB", "COMMIT"):  # it waits long between its attempts
            monkeypatch.setattr(f"modelscope_hub._upload.UPLOAD_{name}_MAX_ATTEMPTS", 1)
        monkeypatch.setattr("modelscope_hub._upload.UPLOAD_FAILED_FILE_MAX_RETRY_ROUNDS", 0)
        monkeypatch.setattr("modelscope_hub._upload.UPLOAD_RECOVERY_ENABLED", False)
    try:
        yield fake
    finally:
        fake.stop()

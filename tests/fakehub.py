"""A model hub on this computer: what huggingface_hub and modelscope ask for, served from a dict.

It can lie (send other bytes than it announces), refuse, and go away.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = COMMIT
    status: int = 200  # 403: gated
    wrong: dict[str, int] = field(default_factory=dict)  # name -> how often it is sent wrong


@dataclass
class FakeHub:
    """``repositories`` are named ``models/owner/name`` and ``datasets/owner/name``."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def start(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # no kept-alive connection outlives the hub

            def log_message(self, format: str, *args: object) -> None: ...

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_POST(self) -> None:
                hub.take(self)

            def do_PUT(self) -> None:
                hub.take(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        url = urlsplit(request.path)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query)
        self.requests.append(f"{request.command} {path}")
        if path.startswith("api/v1/"):
            status, headers, content = self._modelscope(path.removeprefix("api/v1/"), query)
        elif path.startswith("openapi/v1/"):
            status, headers, content = self._modelscope(path.removeprefix("openapi/v1/"), query)
        elif path.startswith("api/"):
            status, headers, content = self._huggingface_api(path.removeprefix("api/"), query)
        else:
            status, headers, content = self._huggingface_file(path)
        if status == 200 and (wanted := request.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {int(first)}-{end - 1}/{len(content)}"
            status, content = 206, content[int(first) : end]
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def take(self, request: BaseHTTPRequestHandler) -> None:
        """What somebody sends; see ``pushhub`` for a hub that takes it."""
        request.send_error(405)

    def _find(self, path: str) -> tuple[Repository, str] | None:
        for name, repository in self.repositories.items():
            if path == name or path.startswith(name + "/"):
                return repository, path.removeprefix(name).strip("/")
        return None

    def _send(self, repository: Repository, name: str) -> bytes:
        content = repository.files[name]
        if repository.wrong.get(name, 0):
            repository.wrong[name] -= 1
            return bytes([content[0] ^ 1]) + content[1:]
        return content

    # Hugging Face

    def _huggingface_api(
        self, path: str, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        found = self._find(path)
        if found is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        repository, rest = found
        if repository.status != 200:
            return repository.status, {"X-Error-Code": "GatedRepo"}, b""
        verb, _, revision = rest.partition("/")
        if verb and revision.split("/")[0] not in ("main", repository.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        entries = [_tree_entry(name, content) for name, content in repository.files.items()]
        if verb == "tree":
            folder = revision.partition("/")[2]
            prefix = f"{folder}/" if folder else ""
            entries = [e for e in entries if e["path"].startswith(prefix)]
            if query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
                below = {e["path"].removeprefix(prefix).partition("/")[0] for e in entries}
                entries = [e for e in entries if "/" not in e["path"].removeprefix(prefix)]
                folders = {prefix + name for name in below} - {e["path"] for e in entries}
                entries += [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
            if not entries:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        if verb not in ("", "revision"):
            return 404, {}, b""
        siblings = [{"rfilename": e["path"], "blobId": e["oid"], **e} for e in entries]
        for sibling in siblings:
            if lfs := sibling.get("lfs"):
                sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}
        info = {"id": path, "sha": repository.commit, "siblings": siblings, "private": False}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _huggingface_file(self, path: str) -> tuple[int, dict[str, str], bytes]:
        found = self._find(path) or self._find(f"models/{path}")
        if found is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        repository, rest = found
        _, _, name = rest.removeprefix("resolve/").partition("/")
        if name not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        entry = _tree_entry(name, repository.files[name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit}
        return 200, headers, self._send(repository, name)

    # ModelScope

    def _modelscope(
        self, path: str, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        found = self._find(path)
        if found is None:
            return 404, {}, json.dumps({"Code": 10010205001, "Message": "not found"}).encode()
        repository, rest = found
        if repository.status != 200:
            return repository.status, {}, json.dumps({"Code": 403, "Message": "gated"}).encode()
        if query.get("Revision", ["master"])[0] not in ("master", repository.commit):
            return 404, {}, json.dumps({"Code": 404, "Message": "no revision"}).encode()
        if rest in ("repo/files", "repo/tree"):
            entries = [
                {
                    "Path": name,
                    "Name": name.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                    "Revision": repository.commit if number == 0 else "f" * 40,
                    "CommittedDate": 1_700_000_000 - number,
                }
                for number, (name, content) in enumerate(repository.files.items())
            ]
            return 200, {}, json.dumps({"Code": 200, "Data": {"Files": entries}}).encode()
        if rest == "repo":
            return 200, {}, self._send(repository, query["FilePath"][0])
        return 200, {}, json.dumps({"Code": 200, "Data": {"Name": path}}).encode()


def _tree_entry(name: str, content: bytes) -> dict:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": name, "oid": blob, "size": len(content)}
    if name.endswith((".safetensors", ".parquet", ".bin")):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry

"""A small Hugging Face hub on the loopback: models with files, as much of its HTTP protocol as the real client uses."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"
COMMIT = "1" * 40


@dataclass
class Repository:
    """A model: its visibility, its files at every revision, the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: bool = False


@dataclass
class Hub:
    """The hub: repositories by name, large files by hash, every request that changed something."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    refuse_commits: bool = False


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._answer({"name": "tester"}) if self._known() else self._answer({"error": "no"}, 401)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._model("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"] and len(parts) >= 5:
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._answer({"error": f"GET {path}"}, 404)

    do_HEAD = do_GET

    def _found(self, name: str, revision: str) -> Repository | None:
        """Return a repository; answer if it, or its revision, is not there."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known()):
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in found.revisions:
            self._answer({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found
        return None

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        if found.gated:
            return self._answer({"error": "Access to it is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        if path not in found.files:
            return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data = found.files[path]
        etag = hashlib.sha256(data).hexdigest()
        self._send(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        return None

    def _model(self, name: str, rest: list[str]) -> None:
        found = self._found(name, rest[1] if rest[:1] == ["revision"] else "main")
        if found is None:
            return None
        if rest[:1] == ["tree"]:
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in found.files.items()
            ]
            return self._answer(files)
        siblings = [{"rfilename": path} for path in found.files]
        return self._answer({"id": name, "private": found.private, "sha": COMMIT, "siblings": siblings, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        name = path.partition(".git/")[0].strip("/") if ".git/" in path else "/".join(path.split("/")[3:5])
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif not self._known():
            self._answer({"error": "Invalid token"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            modes = {file["path"]: self._mode(file["path"]) for file in json.loads(body)["files"]}
            entry = {"shouldIgnore": False, "oid": None}
            self._answer({"files": [{**entry, "path": path, "uploadMode": mode} for path, mode in modes.items()]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/large/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(name, body)
        else:
            self._answer({"error": f"POST {path}"}, 404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == digest
        self.hub.large[digest] = data
        self._answer({})

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".onnx", ".bin")) else "regular"

    def _known(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {TOKEN}")

    def _validate(self, content: str) -> None:
        """Read the front matter as the hub does, and check the types of the keys that it knows."""
        card = yaml.safe_load(content.split("---\n")[1])
        texts = [card.get(key, "") for key in ("library_name", "pipeline_tag", "base_model", "license")]
        if all(isinstance(text, str) for text in texts) and isinstance(card.get("tags", []), list):
            return self._answer({"errors": [], "warnings": []})
        return self._answer({"errors": [{"message": "a value of a wrong type"}], "warnings": []}, 400)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            return self._answer({"error": "You already created this model repo", "url": self._url(name)}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        self.hub.changes.append(f"create {name}")
        return self._answer({"url": self._url(name), "id": name})

    def _commit(self, name: str, body: bytes) -> None:
        if self.hub.refuse_commits:
            return self._answer({"error": "You have no write access"}, 403)
        repository = self.hub.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
        self.hub.changes.append(f"commit {name}")
        return self._answer({"commitUrl": f"{self._url(name)}/commit/{COMMIT}", "commitOid": COMMIT})

    def _url(self, name: str) -> str:
        return f"{self.hub.address}/{name}"

    def _answer(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

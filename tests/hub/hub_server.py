"""A small Hugging Face Hub on 127.0.0.1: the endpoints that the real client calls for models, and plain files.

It keeps a log of requests and can be told to misbehave, see `Fault`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class Fault:
    """What to do instead of answering properly, for requests whose path contains `path`."""

    path: str = ""
    method: str = ""
    status: int = 0  # answer with this status
    delay: float = 0.0  # seconds of silence
    cut: int = 0  # close the connection after so many bytes of the body
    flip: bool = False  # change a byte of the body, announcing the hash of the original
    times: int = 1_000_000
    after: Callable[[], None] = lambda: None  # called before the cut


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = "0" * 40

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)

    def commit(self, files: dict[str, bytes]) -> str:
        merged = {**self.commits.get(self.head, {}), **files}
        digest = hashlib.sha1(repr(sorted((k, len(v)) for k, v in merged.items())).encode() + self.head.encode())
        self.head = digest.hexdigest()
        self.commits[self.head] = merged
        return self.head


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.files: dict[str, bytes] = {}  # served as /files/NAME
        self.objects: dict[str, bytes] = {}  # uploaded by hash
        self.log: list[tuple[str, str, str]] = []  # method, path, range
        self.faults: list[Fault] = []

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repos.clear()
        self.files.clear()
        self.objects.clear()
        self.log.clear()
        self.faults.clear()

    def requests(self, method: str, fragment: str) -> list[str]:
        """Range headers ("" for none) of the requests with this method and this in their path."""
        return [ranges for verb, path, ranges in self.log if verb == method and fragment in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pth"))


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_large(path) else _git_hash(content)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range", "")))
        body = self._body()
        faults = [f for f in self.server.faults if f.path in path and f.method in ("", self.command) and f.times > 0]
        self.fault = faults[0] if faults else Fault()
        self.fault.times -= 1
        time.sleep(self.fault.delay)
        if self.fault.status:
            self._json({"error": "told to fail"}, self.fault.status)
            return
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                getattr(self, method)(body, *match.groups())
                return
        self._json({"error": f"no route for {path}"}, 404)

    do_HEAD = do_GET = do_POST = do_PUT = _handle  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self._head(status, Content_Type="application/json", Content_Length=str(len(body)), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def _content(self, content: bytes, etag: str, **headers: str) -> None:
        start = 0
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if requested and self.headers.get("If-Range", f'"{etag}"') == f'"{etag}"':
            start = int(requested[1])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers |= {"Content_Length": str(len(content) - start), "Accept_Ranges": "bytes", "ETag": f'"{etag}"'}
        self._head(206 if start else 200, **headers)
        if self.command == "HEAD":
            return
        if self.fault.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.fault.cut:
            self.fault.after()
            self.wfile.write(content[start : start + self.fault.cut])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def plain_file(self, body: bytes, name: str) -> None:
        content = self.server.files.get(name)
        if content is None:
            self._json({"error": "no such file"}, 404)
        else:
            self._content(content, hashlib.sha256(content).hexdigest())

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        content = (repo.files(revision) or {}).get(path)
        if content is None:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.head)
            return
        commit = repo.head if revision == "main" else revision
        self._content(content, _etag(path, content), X_Repo_Commit=commit, X_Linked_Size=str(len(content)))

    def model_info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in sorted(repo.files("main") or {})]
        facts = {"id": repo_id, "modelId": repo_id, "private": repo.private, "sha": repo.head}
        self._json({**facts, "siblings": siblings})

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        files = self.server.repos[repo_id].files(revision) or {}
        entries = []
        for path in parse_qs(body.decode())["paths"]:
            if path in files:
                content = files[path]
                entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
                if _is_large(path):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                entries.append(entry)
        self._json(entries)

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        status = 409 if repo_id in self.server.repos else 200
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.server.repos.setdefault(repo_id, Repo(private))
        self._json({"url": f"{self.server.url}/{repo_id}", "name": repo_id}, status)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        files = self.server.repos[repo_id].files("main") or {}
        entries = []
        for path in (entry["path"] for entry in json.loads(body)["files"]):
            oid = _etag(path, files[path]) if path in files else None
            mode = "lfs" if _is_large(path) else "regular"
            entries.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": entries})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        stored = (self.server.repos[repo_id].files("main") or {}).values()
        self.server.objects |= {hashlib.sha256(content).hexdigest(): content for content in stored}
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/upload/{entry['oid']}"}}
            actions = {} if entry["oid"] in self.server.objects else {"actions": upload}
            objects.append({"oid": entry["oid"], "size": entry["size"], **actions})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        self.server.objects[oid] = body
        self._json({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        files = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = self.server.repos[repo_id].commit(files)
        self._json({"commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "hookOutput": ""})

    def nothing(self, body: bytes) -> None:
        self._json({"name": "me", "type": "user", "orgs": []})


_ROUTES = [
    (r"/files/([^/]+)", "plain_file"),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    (r"/api/repos/create", "create"),
    (r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
    (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "model_info"),
    (r"/api/models/([^/]+/[^/]+)", "model_info"),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/upload/([0-9a-f]+)", "upload"),
    (r"/api/(?:validate-yaml|whoami-v2)", "nothing"),
]

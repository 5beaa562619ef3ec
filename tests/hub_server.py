"""A writable Hub on this machine, for tests: the routes that huggingface_hub uses to publish and to load models.

It keeps commits and large files, wants a token where told to, and breaks on request: see `Fault`.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png", ".bin")
MODEL = r"/api/models/([\w.-]+/[\w.-]+)"


@dataclass
class Fault:
    """Break requests of a method to paths that match: answer `status` (and `body`), or hang up after `after` bytes."""

    method: str
    path: str
    status: int | None = None
    after: int = 0
    times: int = 1
    skip: int = 0  # let so many requests pass first
    body: str = '{"error": "out of order"}'
    late: bool = False  # do what was asked, then hang up instead of answering
    silent: float = 0.0  # seconds before an answer

    def hits(self, method: str, path: str) -> bool:
        if not self.times or method != self.method or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Repository:
    private: bool = False
    commits: list = field(default_factory=list)  # (sha, {path: digest}); digests are keys of the store


class Hub:
    """The server; `with Hub(folder) as hub:` serves on hub.url."""

    def __init__(self, folder: Path, token: str | None = None):
        self.folder, self.token = folder, token
        self.repositories: dict[str, Repository] = {}
        self.large: set[str] = set()  # digests of what was uploaded as a large file
        self.faults: list[Fault] = []
        self.log: list[tuple] = []  # method, path, headers
        self.lock = threading.Lock()

    def __enter__(self):
        hub = self
        self.folder.mkdir(parents=True, exist_ok=True)
        handler = type("Bound", (Handler,), {"hub": hub})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / digest).write_bytes(data)
        return digest

    def commit(self, name: str, files: dict) -> str:
        """Commit the whole state of a repository, made if it is not there; `files` holds bytes or digests."""
        files = {path: self.put(data) if isinstance(data, bytes) else data for path, data in files.items()}
        repository = self.repositories.setdefault(name, Repository())
        sha = hashlib.sha1(json.dumps([files, len(repository.commits), name]).encode()).hexdigest()
        repository.commits.append((sha, files))
        return sha

    def files(self, name: str) -> dict:
        return {path: (self.folder / d).read_bytes() for path, d in self.repositories[name].commits[-1][1].items()}

    def entry(self, path: str, digest: str) -> dict:
        data = (self.folder / digest).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}}
        return {"type": "file", "path": path, "oid": blob, "size": len(data), **(lfs if digest in self.large else {})}

    def asked(self, method: str, pattern: str) -> list:
        return [row for row in self.log if row[0] == method and re.search(pattern, row[1])]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _serve(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.log.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
            self.fault = next((f for f in self.hub.faults if f.hits(self.command, path)), None)
        if self.fault and self.fault.silent:
            time.sleep(self.fault.silent)
        if self.fault and self.fault.status:
            self._body()
            return self._json({}, status=self.fault.status, text=self.fault.body)
        if path == "/faults":  # the test's own: how a client in another process orders what breaks next
            self.hub.faults = [Fault(**row) for row in json.loads(self._body())]
            return self._json({})
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return getattr(self, name)(*found.groups())
        return self._error(404, "EntryNotFound", f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            return self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        sizes = iter(lambda: int(self.rfile.readline(), 16), 0)
        data = b"".join(self.rfile.read(size) + self.rfile.readline()[:0] for size in sizes)
        self.rfile.readline()
        return data

    def _json(self, value, status=200, headers=(), text=None):
        data = (json.dumps(value) if text is None else text).encode()
        if self.fault and self.fault.late:
            return self._hang_up()
        self._send(status, data, {"Content-Type": "application/json", **dict(headers)})

    def _send(self, status, data, headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _error(self, status, code, message):
        self._body()
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "text/plain"})

    def _writer(self) -> bool:
        """Whether the token is right; where one is wanted, answers 401 otherwise."""
        if self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._error(401, "Unauthorized", "Invalid username or password.")
        return False

    def _repository(self, name):
        found = self.hub.repositories.get(name)
        allowed = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if found is None or (found.private and not allowed):
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        return found

    def _commit_of(self, name, revision):
        repository = self._repository(name)
        if repository is None:
            return None
        commits = dict(repository.commits)
        revision = repository.commits[-1][0] if revision in (None, "main") else revision
        if revision not in commits:
            self._error(404, "RevisionNotFound", f"no revision {revision}")
            return None
        return revision, commits[revision]

    def create(self):
        wanted = json.loads(self._body())
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if not self._writer():
            return
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        hidden = wanted.get("private") or wanted.get("visibility") == "private"  # as older and newer clients ask for it
        self.hub.repositories[name].private = bool(hidden)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, name, _):
        files = json.loads(self._body())["files"]
        if self._writer() and self._repository(name):
            modes = ["lfs" if f["path"].endswith(LARGE) or f["size"] > 10_000_000 else "regular" for f in files]
            rows = [
                {"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)
            ]
            self._json({"files": rows})

    def batch(self, name):
        objects = json.loads(self._body())["objects"]
        if self._writer() and self._repository(name):
            rows = []
            for each in objects:
                there = (self.hub.folder / each["oid"]).exists()
                upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                rows.append({"oid": each["oid"], "size": each["size"], **({} if there else upload)})
            self._json({"transfer": "basic", "objects": rows})

    def upload(self, digest):
        left, part = int(self.headers["Content-Length"]), self.hub.folder / f"{digest}.{next(_NUMBERS)}"
        if self.fault and not self.fault.late:
            self.rfile.read(min(self.fault.after, left))
            return self._hang_up()
        seen = hashlib.sha256()
        with part.open("wb") as file:
            while left:
                chunk = self.rfile.read(min(left, 1 << 20))
                if not chunk:
                    return part.unlink()
                left -= len(chunk)
                seen.update(chunk)
                file.write(chunk)
        if seen.hexdigest() != digest:
            return self._error(400, "BadDigest", "not the digest that was announced")
        part.rename(self.hub.folder / digest)
        self.hub.large.add(digest)
        self._json({})

    def commits(self, name, _):
        lines = [json.loads(line) for line in self._body().splitlines()]
        if not self._writer() or self._repository(name) is None:
            return
        sha, files = self.hub.repositories[name].commits[-1]
        files = dict(files)
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header" and value.get("parentCommit", sha) != sha:
                return self._error(412, "PreconditionFailed", "the branch has moved on")
            if kind == "file":
                files[value["path"]] = self.hub.put(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if not (self.hub.folder / value["oid"]).exists():
                    return self._error(400, "LfsMissing", f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(name, files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def validate(self):
        self._body()
        self._json({"errors": [], "warnings": []})

    def info(self, name, revision=None):
        found = self._commit_of(name, revision)
        if found:
            siblings = [{"rfilename": path} for path in found[1]]
            private = self.hub.repositories[name].private
            self._json({"id": name, "modelId": name, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, name, revision):
        found = self._commit_of(name, revision)
        if found:
            self._json([self.hub.entry(path, digest) for path, digest in found[1].items()])

    def resolve(self, name, revision, path):
        found = self._commit_of(name, revision)
        if found is None:
            return None
        if path not in found[1]:
            return self._error(404, "EntryNotFound", f"no file {path}")
        digest = found[1][path]
        data = (self.hub.folder / digest).read_bytes()
        entry, start, status = self.hub.entry(path, digest), 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{digest if "lfs" in entry else entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if wanted:
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.fault and self.command == "GET":
            headers["Content-Length"] = len(data) - start
            self._send(status, data[start : start + self.fault.after], headers)
            return self._hang_up()
        return self._send(status, data[start:], {"Accept-Ranges": "bytes", **headers})


_NUMBERS = itertools.count()
ROUTES = (
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), MODEL + r"/preupload/(\w+)", "preupload"),
    (("POST",), r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/lfs/(\w+)", "upload"),
    (("POST",), MODEL + r"/commit/(\w+)", "commits"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("GET",), MODEL, "info"),
    (("GET",), MODEL + r"/revision/(\w+)", "info"),
    (("GET",), MODEL + r"/tree/(\w+)", "tree"),
    (("GET", "HEAD"), r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", "resolve"),
)

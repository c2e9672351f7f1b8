"""A Hub on the loopback interface: enough of its protocol for the real client to list, pin, range-read and download.

Repositories live in memory. Weight files are answered as the real Hub answers LFS files: by a redirect to another
origin (`localhost` instead of `127.0.0.1`), which refuses a request that still carries a token. `latency` and
`bandwidth` make it a distant one; `faults` says what goes wrong with the next requests for tensors, `always` with all:

    cut       the connection breaks in the middle of the body      short     an honest answer, but of half the bytes
    busy      429 with Retry-After: 1                               error     500
    length    another total length                                  loop      a redirect to itself
    replaced  the file is another from now on, of the same length   expired   the signed address is no longer valid
    revoked   and neither is the token                              slow      the body comes in drops, for ten seconds
    shifted   the part before the one that was asked for            packed    in gzip, though nobody asked for it
"""

import gzip
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import hub_oauth
import hub_writes


@dataclass
class Repo:
    """Commits are {sha: {path: bytes}}, branches {name: sha}. A private or gated one wants `token`. Without `lfs`,
    weight files lie in git itself: no hash is listed, and they are answered without a redirect."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    lfs: bool = True
    disabled: bool = False
    owner: str = ""
    pulls: list[hub_writes.Pull] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files; returns its hash."""
        digest = hashlib.sha1(branch.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode())
            digest.update(data)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


@dataclass
class Hub:
    """A running server. `requests` are (method, path, range), `sent` counts the bytes of files that left it, `first`
    and `last` are the times of a weight file's first byte and of any file's last one. `latency` is in seconds a
    request, `bandwidth` in bytes a second, for all connections together."""

    repos: dict[str, Repo] = field(default_factory=dict)
    token: str = "hf_test_token"
    users: dict[str, str] = field(
        default_factory=lambda: {"hf_test_token": "tester", "hf_other_token": "other", "hf_third_token": "third"}
    )
    visitor: str = "hf_other_token"  # who signs in
    codes: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    scopes: str = ""
    failing: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    down: bool = False
    port: int = 0
    latency: float = 0
    bandwidth: float = 0
    faults: list[str] = field(default_factory=list)
    always: str = ""
    first: float = 0
    last: float = 0
    free_at: float = 0  # when the line has sent what it was given
    hashes: dict[int, tuple[bytes, str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, files: dict[str, bytes], **flags: bool) -> str:
        """A new repository with one commit on main; returns the commit."""
        self.repos[repo_id] = Repo(**flags)
        return self.repos[repo_id].commit(files)

    def clear(self) -> None:
        """Forget everything, as if just started."""
        fresh = Hub(port=self.port)
        for name in vars(fresh):
            if name != "lock":
                setattr(self, name, getattr(fresh, name))

    def sha256(self, data: bytes) -> str:
        """The hash of a file, computed once."""
        if id(data) not in self.hashes:
            self.hashes[id(data)] = data, hashlib.sha256(data).hexdigest()
        return self.hashes[id(data)][1]

    def fault(self) -> str:
        """What goes wrong with this request for a tensor, if anything."""
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def pace(self, size: int) -> None:
        """Wait until the line has carried that many bytes more."""
        if self.bandwidth:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + size / self.bandwidth
                until = self.free_at
            time.sleep(max(0.0, until - time.monotonic()))


def start() -> Hub:
    """Serve a new Hub from a daemon thread."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none."""


class _Handler(hub_writes.Writes, hub_oauth.SignIn, BaseHTTPRequestHandler):
    hub: Hub
    muted = False  # the work is done, the answer withheld
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, *_: object) -> None:
        pass

    def _route(self) -> None:
        path = hub_writes.one_kind(unquote(self.path.partition("?")[0]))
        time.sleep(self.hub.latency)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.down:
            self.close_connection = True
            return
        for kind, pattern, answer in (
            ("", r"/api/agent-harnesses", self._harnesses),
            ("", r"/\.well-known/openid-configuration", self._openid),
            ("", r"/oauth/jwks", self._jwks),
            ("", r"/oauth/authorize", self._authorize),
            ("", r"/oauth/userinfo", self._userinfo),
            ("", r"/api/models/([\w.-]+(?:/[\w.-]+)?)/auth-check", self._auth_check),
            ("whoami", r"/api/whoami-v2", self._whoami),
            ("discussions", r"/api/models/([\w.-]+(?:/[\w.-]+)?)/discussions", self._discussions),
            ("tree", r"/api/models/([\w.-]+(?:/[\w.-]+)?)/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?", self._tree),
            ("info", r"/api/models/([\w.-]+(?:/[\w.-]+)?)/revision/(.+)", self._info),
            ("info", r"/api/models/([\w.-]+(?:/[\w.-]+)?)", self._info),
            ("list", r"/api/models", self._models),
            ("", r"/cdn/([\w.-]+(?:/[\w.-]+)?)/([0-9a-f]{40})/(.+)", self._cdn),
            ("resolve", r"/([\w.-]+(?:/[\w.-]+)?)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                return self._guarded(kind, partial(answer, *match.groups()))
        return self._error(404, "RepoNotFound")

    def _harnesses(self) -> None:
        self._json({"standardEnvVars": [], "harnesses": {}})

    def _find(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or `None` after an error was answered."""
        repo = self.hub.repos.get(repo_id)
        allowed = self._is_known()
        if self.headers.get("Authorization") and not allowed and self.user() is None:
            self._error(401, "", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        if repo is None or (repo.private and not allowed):
            self._error(401, "RepoNotFound")
            return None
        if repo.gated and not allowed:
            self._error(403, "GatedRepo")
            return None
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            self._error(404, "RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _models(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        author, words, limit = (asked.get(key, [""])[0] for key in ("author", "search", "limit"))
        seen = [n for n, repo in self.hub.repos.items() if not repo.private or self._is_known()]
        names = [n for n in seen if n.startswith(f"{author}/" if author else "") and words in n]
        self._json([{"_id": "0", "id": n, "modelId": n, "tags": []} for n in names[: int(limit or 1000)]])

    def _auth_check(self, repo_id: str) -> None:
        if self._find(repo_id, None):
            self._json({})

    def _info(self, repo_id: str, revision: str | None = None) -> None:
        if found := self._find(repo_id, revision):
            sha, files = found
            siblings = [{"rfilename": name} for name in sorted(files)]
            repo = self.hub.repos[repo_id]
            told = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, "tags": [],
                    "private": repo.private, "gated": "auto" if repo.gated else False}  # fmt: skip
            self._json({**told, "disabled": True} if repo.disabled else told)

    def _tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        if found := self._find(repo_id, revision):
            _, files = found
            prefix = f"{folder}/" if folder else ""
            recursive = "recursive=true" in self.path.lower()
            entries = []
            for name, data in sorted(files.items()):
                if not name.startswith(prefix) or ("/" in name.removeprefix(prefix) and not recursive):
                    continue
                entry = {"type": "file", "path": name, "oid": self.hub.sha256(data)[:40], "size": len(data)}
                if name.endswith(".safetensors") and self.hub.repos[repo_id].lfs:
                    entry["lfs"] = {"oid": self.hub.sha256(data), "size": len(data), "pointerSize": 134}
                entries.append(entry)
            if folder and not entries:
                return self._error(404, "EntryNotFound")
            self._json(entries)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        if not (found := self._find(repo_id, revision)):
            return None
        sha, files = found
        if name not in files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        data = files[name]
        if not name.endswith(".safetensors") or not self.hub.repos[repo_id].lfs:
            return self._file(data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.hub.port}/cdn/{repo_id}/{sha}/{name}?signature=secret")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("X-Linked-Etag", f'"{self.hub.sha256(data)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _cdn(self, repo_id: str, sha: str, name: str) -> None:
        if self.headers.get("Authorization"):
            return self._error(400, "TokenLeaked")
        self.hub.first = self.hub.first or time.time()
        files = self.hub.repos[repo_id].commits[sha]
        fault = "" if self.headers.get("Range", "").startswith("bytes=0-") else self.hub.fault()
        if fault == "revoked":
            self.hub.token = "another"
        if fault in ("expired", "revoked"):
            return self._error(403, "")
        if fault in ("busy", "error"):
            return self._error(429 if fault == "busy" else 500, "", {"Retry-After": "1"} if fault == "busy" else None)
        if fault == "loop":
            return self._error(302, "", {"Location": self.path})
        if fault == "replaced":
            files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        return self._file(files[name], {"ETag": f'"{self.hub.sha256(files[name])[:32]}"'}, fault)

    def _file(self, data: bytes, headers: dict[str, str], fault: str = "") -> None:
        status, extra, total = 200, {}, len(data) + (fault == "length")
        data = memoryview(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match.group(1)), min(int(match.group(2) or len(data) - 1) + 1, len(data))
            start, stop = (start - 8, stop - 8) if fault == "shifted" else (start, stop)
            status, extra = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{total}"}
            data = data[start:stop]
        if fault == "packed":
            data, extra = memoryview(gzip.compress(data)), {**extra, "Content-Encoding": "gzip"}
        half = data[: len(data) // 2]
        data = half if fault == "short" else data
        self.send_response(status)
        for key, value in {**headers, **extra, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._send(half if fault == "cut" else data, drops=100 if fault == "slow" else 0)
            self.close_connection |= fault == "cut"

    def _send(self, data: memoryview, drops: int = 0) -> None:
        self.hub.sent += len(data)
        step = -(-len(data) // drops) if drops else 2**16
        for start in range(0, len(data), max(1, step)):
            self.hub.pace(len(data[start : start + step]))
            self.wfile.write(data[start : start + step])
            time.sleep(0.1 if drops else 0)
        self.hub.last = time.time()

    def _json(self, value: object, status: int = 200) -> None:
        if self.muted:
            return
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

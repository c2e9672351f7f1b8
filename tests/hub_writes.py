"""What the loopback Hub answers to writers: who they are, pull requests, commits. Mixed into its handler."""

import base64
import json
import re
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


BLOCK = re.compile(r"\s*---\r?\n(.*?)\r?\n---", re.DOTALL)  # huggingface_hub reads the endpoint when it is imported
NAME = r"([\w.-]+(?:/[\w.-]+)?)"
WHEN = "2026-01-01T00:00:00.000Z"


@dataclass
class Pull:
    """A pull request; its branch is refs/pr/NUMBER."""

    number: int
    title: str
    description: str
    author: str
    status: str = "open"
    comments: list[str] = field(default_factory=list)

    def public(self, repo_id: str) -> dict[str, object]:
        return {"num": self.number, "title": self.title, "status": self.status, "author": {"name": self.author},
                "createdAt": WHEN, "isPullRequest": True, "repo": {"name": repo_id, "type": "model"}}  # fmt: skip


class Writes:
    """`hub.failing` maps a kind of request to the status codes of its next answers; a negative one does the work and
    then answers so."""

    def do_POST(self) -> None:
        path, query = one_kind(unquote(urlsplit(self.path).path)), parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(("POST", path, ""))
        for kind, pattern, answer in (
            ("validate", r"/api/validate-yaml", self._validate),
            ("", r"/oauth/token", self._token),
            ("create", r"/api/repos/create", self._create),
            ("preupload", rf"/api/models/{NAME}/preupload/(.+)", self._preupload),
            ("commit", rf"/api/models/{NAME}/commit/(.+)", self._commit),
            ("title", rf"/api/models/{NAME}/discussions/(\d+)/title", self._title),
            ("status", rf"/api/models/{NAME}/discussions/(\d+)/status", self._status),
        ):
            if match := re.fullmatch(pattern, path):
                return self._guarded(kind, partial(answer, *match.groups(), body=body, query=query))
        return self._error(404, "RepoNotFound")

    def _guarded(self, kind: str, answer) -> None:
        with self.hub.lock:
            waiting = self.hub.failing.get(kind, [])
            status = waiting.pop(0) if waiting else 0
        if status < 0:
            self.muted = True
            answer()
            self.muted = False
        if status:
            return self._error(abs(status), "", {"Retry-After": "0"})
        return answer()

    def user(self) -> str | None:
        """Whose token came with the request."""
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _whoami(self) -> None:
        if self.user() is None:
            return self._error(401, "")
        return self._json({"type": "user", "name": self.user(), "fullname": self.user(), "orgs": [], "auth": {}})

    def _discussions(self, repo_id: str) -> None:
        if self._find(repo_id, None):
            found = [pull.public(repo_id) for pull in self.hub.repos[repo_id].pulls]
            self._json({"discussions": found, "count": len(found), "start": 0})

    def _create(self, *, body: bytes, query: object) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if self.user() is None:
            return self._error(401, "")
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.add(name, {}, owner=self.user())
        return self._json({"url": f"{self.hub.url}/datasets/{name}", "name": name, "id": name}, status)

    def _validate(self, *, body: bytes, query: object) -> None:
        found = BLOCK.match(json.loads(body)["content"])
        try:
            fine = found is None or isinstance(yaml.safe_load(found.group(1)), (dict, type(None)))
        except yaml.YAMLError:
            fine = False
        if fine:
            return self._json({"errors": [], "warnings": []})
        return self._json({"errors": [{"message": "not valid YAML"}], "warnings": []}, status=400)

    def _preupload(self, repo_id: str, revision: str, *, body: bytes, query: object) -> None:
        if not (found := self._find(repo_id, revision)):
            return
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, **({"oid": blob(found[1][f["path"]])}
             if f["path"] in found[1] else {})}
            for f in json.loads(body)["files"]
        ]  # fmt: skip
        self._json({"files": files})

    def _commit(self, repo_id: str, revision: str, *, body: bytes, query: dict[str, list[str]]) -> None:
        if not (found := self._find(repo_id, revision)):
            return None
        author = self.user()
        if author is None:
            return self._error(401, "")
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        repo = self.hub.repos[repo_id]
        is_pull = bool(query.get("create_pr"))
        if not is_pull and not revision.startswith("refs/pr/") and author not in (repo.owner or repo_id.split("/")[0]):
            return self._error(403, "")
        with self.hub.lock:
            parent = header.get("parentCommit") or found[0]
            if parent != repo.branches.get(revision, revision) and not is_pull:
                return self._error(412, "")
            files = dict(repo.commits[parent])
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if is_pull:
                pull = Pull(len(repo.pulls) + 1, header["summary"], header.get("description", ""), author)
                repo.pulls.append(pull)
                revision = f"refs/pr/{pull.number}"
            sha = repo.commit(files, revision)
        url = f"{self.hub.url}/{repo_id}"
        told = {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha}
        return self._json({**told, "pullRequestUrl": f"{url}/discussions/{pull.number}"} if is_pull else told)

    def _title(self, repo_id: str, number: str, *, body: bytes, query: object) -> None:
        if not self._find(repo_id, None):
            return
        pull = self.hub.repos[repo_id].pulls[int(number) - 1]
        before, pull.title = pull.title, json.loads(body)["title"]
        event = {"id": "0", "type": "title-change", "createdAt": WHEN, "author": {"name": self.user()},
                 "data": {"from": before, "to": pull.title}}  # fmt: skip
        self._json({"newTitle": event})

    def _status(self, repo_id: str, number: str, *, body: bytes, query: object) -> None:
        if not self._find(repo_id, None):
            return
        asked, pull = json.loads(body), self.hub.repos[repo_id].pulls[int(number) - 1]
        pull.status = asked["status"]
        pull.comments.append(asked.get("comment", ""))
        event = {"id": "0", "type": "status-change", "createdAt": WHEN, "author": {"name": self.user()},
                 "data": {"status": pull.status}}  # fmt: skip
        self._json({"newStatus": event})


def one_kind(path: str) -> str:
    """Datasets are kept beside the models."""
    return path.replace("/api/datasets/", "/api/models/", 1).removeprefix("/datasets")


def blob(data: bytes) -> str:
    """The hash that git gives a file."""
    import hashlib

    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

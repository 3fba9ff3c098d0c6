"""A small Hub on loopback: files by real requests, with etags, redirects, refusals and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

LARGE = (".safetensors", ".bin", ".pth")  # kept apart, under their SHA-256
RESOLVE = re.compile(r"(?:/datasets)?/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)")
DATASET = re.compile(
    r"/api/(?:datasets|models)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([\w.-]+)(.*))?"
)


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked for.

    Attributes:
        repos: files of every repository; of a branch under ORG/NAME@BRANCH.
        gated, private: repositories that want a permission, or the token hf_test.
        breaks: after so many bytes the first answer to a GET of a large file ends.
        forged: bytes that are sent in the place of a large file's.
        requests: method and path of everything that was asked for, with the range if one was.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    breaks: int = 0
    forged: bytes | None = None
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def at(self, repo: str, revision: str) -> str | None:
        """The key of a repository's files at a revision; None where it has no such revision."""
        keys = [repo, *(k for k in self.repos if k.startswith(f"{repo}@"))]
        named = {"main": repo, **{k.partition("@")[2]: k for k in keys[1:]}}
        return named.get(revision) or next((k for k in keys if self.commit(k) == revision), None)

    def commit(self, repo: str) -> str:
        """Of the present content."""
        digest = hashlib.sha1()
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def blob(self, digest: str) -> bytes | None:
        contents = [c for files in self.repos.values() for c in files.values()]
        return next((c for c in contents if hashlib.sha256(c).hexdigest() == digest), None)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The Hub, answering at `hub.url`; large files are on another host, as a CDN is."""

    class Answering(_Handler):
        pass

    Answering.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
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

    def log_message(self, *words: object) -> None:
        pass

    def _note(self) -> None:
        asked = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {self.path}" + (f" {asked}" if asked else ""))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def _known(self) -> bool:
        return self.headers.get("Authorization") == "Bearer hf_test"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._note()
        if self.path.startswith("/cdn/"):
            self._large(self.path.removeprefix("/cdn/"))
            return
        path = self.path.partition("?")[0]
        if known := DATASET.fullmatch(path):
            self._dataset(*known.groups())
            return
        found = RESOLVE.fullmatch(path)
        if not found:
            self._answer(404, X_Error_Code="RepoNotFound")
            return
        repo, revision, name = found.groups()
        if repo in self.hub.gated:
            self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask its owner")
        elif repo not in self.hub.repos or (repo in self.hub.private and not self._known()):
            self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif (key := self.hub.at(repo, revision)) is None:
            self._answer(404, X_Error_Code="RevisionNotFound")
        else:
            self._file(key, name)

    def _dataset(self, repo: str, kind: str | None, revision: str | None, below: str) -> None:
        """What a Hub says of a data set, and of its files."""
        if repo in self.hub.gated:
            self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask its owner")
        elif repo in self.hub.private or repo not in self.hub.repos:
            self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in (None, "main", self.hub.commit(repo)):
            self._answer(404, X_Error_Code="RevisionNotFound")
        elif kind in ("tree", "paths-info"):
            deep = "recursive=true" in self.path.lower()
            self._json(self._entries(repo, (below or "").strip("/"), below=deep))
        else:
            files = [{"rfilename": name} for name in self.hub.repos[repo]]
            self._json({"id": repo, "sha": self.hub.commit(repo), "private": False, "tags": [],
                        "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                        "siblings": files})  # fmt: skip

    def _entries(self, repo: str, folder: str, *, below: bool = True) -> list[dict[str, Any]]:
        """The files of a folder and of those below it; or what lies directly in it."""
        start, found = f"{folder}/" if folder else "", dict[str, dict[str, Any]]()
        for name, content in self.hub.repos[repo].items():
            if not name.startswith(start):
                continue
            first, deeper, _ = name.removeprefix(start).partition("/")
            digest = hashlib.sha1(content).hexdigest()
            if deeper and not below:
                path = start + first
                found[path] = {"type": "directory", "path": path, "size": 0, "oid": digest}
            else:
                found[name] = {"type": "file", "path": name, "size": len(content), "oid": digest}
        return list(found.values())

    def _file(self, repo: str, name: str) -> None:
        content, commit = self.hub.repos[repo].get(name), self.hub.commit(repo)
        if content is None:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            self._answer(
                302,
                Location=f"{self.hub.url}/cdn/{digest}".replace("127.0.0.1", "localhost"),
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(content)),
            )
        else:
            etag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def _large(self, digest: str) -> None:
        content = self.hub.blob(digest)
        if content is None:
            self._answer(404)
            return
        content = self.hub.forged or content
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        part = content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{digest}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks and not asked:
            self.wfile.write(part[: self.hub.breaks])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(part)

    def do_PUT(self) -> None:
        self._note()
        self.hub.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        self._note()
        body = self._body()
        if known := DATASET.fullmatch(self.path.partition("?")[0]):
            asked = parse_qs(body.decode()).get("paths", [])
            entries = self._entries(known[1], "") if known[1] in self.hub.repos else []
            self._json([e for e in entries if e["path"] in asked])
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._known():
            self._json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._json({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"objects": objects, "transfer": "basic"})
        elif "/branch/" in self.path:
            self._branch()
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer(404)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        there = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {})
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo}, 409 if there else 200)

    def _place(self) -> str:
        """The key of the files that a path with a branch at its end is about."""
        *_, org, name, _, branch = self.path.partition("?")[0].split("/")
        return f"{org}/{name}" + ("" if branch == "main" else f"@{branch}")

    def _branch(self) -> None:
        key = self._place()
        there = key in self.hub.repos
        self.hub.repos.setdefault(key, dict(self.hub.repos[key.partition("@")[0]]))
        self._json({}, 409 if there else 200)

    def _commit(self, body: bytes) -> None:
        repo = self._place()
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.commit(repo)
        url = f"{self.hub.url}/{repo.partition('@')[0]}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

"""A stand-in for the Hugging Face hub: as much of its HTTP API as pushing and downloading a dataset needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 2000  # bytes from which a file goes the way of large files


class Hub:
    """Repositories as lists of revisions; ``log`` has each request, ``refuse`` may answer one with an error."""

    def __init__(self):
        self.repos = {}  # name -> {"private", "branches": {branch: commit}, "commits": {commit: {path: bytes}}}
        self.blobs = {}  # SHA-256 -> bytes
        self.log = []
        self.refuse = lambda method, path: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Requests", (_Requests,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo, revision="main"):
        """The files of a revision."""
        found = self.repos[repo]
        return found["commits"][found["branches"].get(revision, revision)]

    def history(self, repo, branch="main"):
        """The names of the files after each commit of a branch."""
        return [sorted(files) for files in self.repos[repo]["commits"].values()]

    def add_commit(self, repo, branch, files):
        found = self.repos[repo]
        name = hashlib.sha1(f"{repo} {branch} {len(found['commits'])}".encode()).hexdigest()
        found["commits"][name] = files
        found["branches"][branch] = name
        return name


class _Requests(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, value=None, status=200, content=None, **headers):
        data = content if content is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def route(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.log.append((self.command, path))
        if (status := self.hub.refuse(self.command, path)) is not None:
            return self.answer({"error": "refused"}, status)
        for method, pattern, do in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return do(self, body, **match.groupdict())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def commit_of(self, repo, revision):
        found = self.hub.repos.get(repo)
        return found and found["branches"].get(revision, revision if revision in found["commits"] else None)

    # ------------------------------------------------------------------------------------------------------- to write

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        status = 409 if repo in self.hub.repos else 200
        if status == 200:
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.hub.repos[repo] = {"private": private, "branches": {}, "commits": {}}
            self.hub.add_commit(repo, "main", {".gitattributes": b""})
        self.answer({"url": f"{self.hub.url}/datasets/{repo}", "error": "exists"}, status)

    def branch(self, body, repo, branch):
        branches = self.hub.repos[repo]["branches"]
        status = 409 if branch in branches else 200
        branches.setdefault(branch, branches["main"])
        self.answer({}, status)

    def preupload(self, body, repo, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def validate(self, body):
        text = json.loads(body)["content"]
        front = yaml.safe_load(text.split("---")[1])
        self.answer({"errors": [] if front.get("configs") else [{"message": "no configs"}], "warnings": []})

    def batch(self, body, repo):
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"]}
            | ({} if wanted["oid"] in self.hub.blobs else {"actions": {"upload": {"href": self.url_of(wanted["oid"])}}})
            for wanted in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def url_of(self, oid):
        return f"{self.hub.url}/blobs/{oid}"

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer({})

    def commit(self, body, repo, revision):
        files = dict(self.hub.files(repo, revision))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        name = self.hub.add_commit(repo, revision, files)
        self.answer({"commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{name}", "commitOid": name})

    # -------------------------------------------------------------------------------------------------------- to read

    def info(self, body, repo, revision="main"):
        name = self.commit_of(repo, revision)
        if name is None:
            return self.missing("RepoNotFound" if repo not in self.hub.repos else "RevisionNotFound")
        siblings = [{"rfilename": path} for path in self.hub.files(repo, name)]
        return self.answer({"id": repo, "sha": name, "siblings": siblings, "private": False, "tags": []})

    def tree(self, body, repo, revision, folder=""):
        within = f"{folder}/" if folder else ""
        whole = self.hub.files(repo, self.commit_of(repo, revision))
        files = {path: data for path, data in whole.items() if path.startswith(within)}
        if within and not files:
            return self.missing("EntryNotFound")
        folders = []
        if "recursive=false" in urlsplit(self.path).query.lower():
            below = {path: path.removeprefix(within).split("/") for path in files}
            folders = sorted({within + parts[0] for parts in below.values() if len(parts) > 1})
            files = {path: data for path, data in files.items() if len(below[path]) == 1}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders] + [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            | ({"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}}
               if len(data) >= LARGE else {})
            for path, data in files.items()
        ]  # fmt: skip
        return self.answer(entries)

    def resolve(self, body, repo, revision, path):
        name = self.commit_of(repo, revision)
        if name is None:
            return self.missing("RepoNotFound" if repo not in self.hub.repos else "RevisionNotFound")
        data = self.hub.files(repo, name).get(path)
        if data is None:
            return self.missing("EntryNotFound")
        digest = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else hashlib.sha1(data).hexdigest()
        return self.answer(
            content=data, Content_Type="application/octet-stream", ETag=f'"{digest}"', X_Repo_Commit=name
        )


_REPO = r"(?P<repo>[\w.-]+(/[\w.-]+)?)"
_ROUTES = [
    ("POST", "/api/repos/create", _Requests.create),
    ("POST", "/api/validate-yaml", _Requests.validate),
    ("POST", f"/api/datasets/{_REPO}/branch/(?P<branch>.+)", _Requests.branch),
    ("POST", f"/api/datasets/{_REPO}/preupload/(?P<revision>[^/]+)", _Requests.preupload),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _Requests.batch),
    ("PUT", "/blobs/(?P<oid>[0-9a-f]+)", _Requests.put),
    ("POST", f"/api/datasets/{_REPO}/commit/(?P<revision>[^/]+)", _Requests.commit),
    ("GET", f"/api/datasets/{_REPO}/revision/(?P<revision>[^/]+)", _Requests.info),
    ("GET", f"/api/datasets/{_REPO}/tree/(?P<revision>[^/]+)", _Requests.tree),
    ("GET", f"/api/datasets/{_REPO}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Requests.tree),
    ("GET", f"/api/datasets/{_REPO}", _Requests.info),
    ("GET", f"/datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Requests.resolve),
    ("HEAD", f"/datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Requests.resolve),
]

"""A Hugging Face Hub on 127.0.0.1, as far as pushing and loading models needs one: repositories held in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
PIPELINE_TAGS = {
    "audio-classification",
    "feature-extraction",
    "image-classification",
    "image-feature-extraction",
    "video-classification",
}
LICENSES = {"apache-2.0", "cc-by-4.0", "cc0-1.0", "mit", "unknown"}


class HubStandIn(ThreadingHTTPServer):
    """The server: `repos` maps an id to its commits, each a (sha, {path: content}); `objects` holds LFS files.

    Who writes needs a token, "hf_read" excepted, which may read alone; a name without its owner is of "me". Of the
    repositories in `private`, the Hub says so. The next `failures` commits fail.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.failures = 0
        self.unknown_requests: list[str] = []

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        parent = self.repos[repo_id][-1][0] if self.repos[repo_id] else ""
        digest = hashlib.sha1(parent.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.repos[repo_id].append((digest.hexdigest(), files))
        return digest.hexdigest()

    def files(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """(sha, {path: content}) of a revision; `None` if there is no such repository or revision."""
        commits = self.repos.get(repo_id, [])
        return next((commit for commit in reversed(commits) if revision in ("main", commit[0])), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, *args):
        """Say nothing."""

    def _serve(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                refused = self._refusal() if answer in WRITING else None
                return self._reply(*refused) if refused else answer(self, **match.groupdict())
        self.server.unknown_requests.append(f"{self.command} {self.path}")
        self._reply(501, {"error": f"the stand-in does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _reply(self, status: int, content: dict | list | bytes, **headers: str):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _not_found(self, code: str):
        self._reply(404, {"error": code}, X_Error_Code=code)

    def _refusal(self) -> tuple[int, dict] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return 401, {"error": "Invalid username or password."}
        return (403, {"error": "This token may read alone"}) if token == "hf_read" else None

    def _may_write(self, id):
        self._reply(200, {})

    def _create(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        status = 409 if repo_id in self.server.repos else 200
        if status == 200:
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repo_id)
            self.server.repos[repo_id] = []
            self.server.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._reply(status, {"url": f"{self.server.endpoint}/{repo_id}"})

    def _validate_yaml(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        self._reply(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def _preupload(self, id, revision):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(paths, modes)]
        self._reply(200, {"files": files})

    def _lfs_batch(self, id):
        objects = json.loads(self.body)["objects"]
        for sample in objects:
            actions = {"upload": f"/lfs/{sample['oid']}", "verify": f"/lfs/{sample['oid']}/verify"}
            sample["actions"] = {name: {"href": self.server.endpoint + path} for name, path in actions.items()}
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid):
        intact = hashlib.sha256(self.body).hexdigest() == oid
        if intact:
            self.server.objects[oid] = self.body
        self._reply(200 if intact else 422, {})

    def _lfs_verify(self, oid):
        self._reply(200 if oid in self.server.objects else 404, {})

    def _commit(self, id, revision):
        if self.server.failures:
            self.server.failures -= 1
            return self._reply(403, {"error": "The storage is full"})
        files = dict(self.server.files(id)[1])
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] != "header":
                raise NotImplementedError(operation["key"])
        sha = self.server.commit(id, files)
        self._reply(200, {"commitOid": sha, "commitUrl": f"{self.server.endpoint}/{id}/commit/{sha}"})

    def _info(self, id, revision=None):
        if (found := self.server.files(id, revision or "main")) is None:
            return self._not_found("RevisionNotFound" if id in self.server.repos else "RepoNotFound")
        siblings = [{"rfilename": path} for path in found[1]]
        self._reply(200, {"id": id, "sha": found[0], "private": id in self.server.private, "siblings": siblings})

    def _tree(self, id, revision):
        if (found := self.server.files(id, revision)) is None:
            return self._not_found("RevisionNotFound" if id in self.server.repos else "RepoNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in found[1].items()
        ]
        self._reply(200, entries)

    def _resolve(self, id, revision, path):
        if (found := self.server.files(id, revision)) is None:
            return self._not_found("RevisionNotFound" if id in self.server.repos else "RepoNotFound")
        sha, files = found
        if path not in files:
            return self._not_found("EntryNotFound")
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-").groups()
        content = files[path][int(first) : int(last) + 1 if last else None]
        self._reply(
            206 if self.headers.get("Range") else 200,
            content,
            ETag=f'"{hashlib.sha256(files[path]).hexdigest()}"',
            X_Repo_Commit=sha,
        )

    def _dataset_tree(self, id, revision, folder=None):
        if (found := self.server.files(id, revision)) is None:
            return self._not_found("RevisionNotFound" if id in self.server.repos else "RepoNotFound")
        prefix = f"{folder}/" if folder else ""
        below = {path: content for path, content in found[1].items() if path.startswith(prefix)}
        return self._reply(200, list(_entries(below))) if below else self._not_found("EntryNotFound")

    def _paths_info(self, id, revision):
        wanted, (_, files) = json.loads(self.body)["paths"], self.server.files(id, revision)
        self._reply(200, [entry for entry in _entries(files) if entry["path"] in wanted])

    def _no_such_page(self):
        self._not_found("EntryNotFound")


def _entries(files: dict[str, bytes]):
    """Files and the folders that they are in, as the Hub lists them."""
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in files):
        if folder:
            yield {"type": "directory", "path": folder, "size": 0, "oid": hashlib.sha1(folder.encode()).hexdigest()}
    for path, content in files.items():
        yield {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


ROUTES = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    ("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)", _Handler._commit),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler._lfs_upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler._lfs_verify),
    ("GET", f"/api/models/{ID}/auth-check/write", _Handler._may_write),
    ("GET", f"/api/models/{ID}", _Handler._info),
    ("GET", f"/api/models/{ID}/revision/(?P<revision>[^/]+)", _Handler._info),
    ("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)", _Handler._tree),
    ("GET", f"/api/datasets/{ID}", _Handler._info),
    ("GET", f"/api/datasets/{ID}/revision/(?P<revision>[^/]+)", _Handler._info),
    ("GET", f"/api/datasets/{ID}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler._dataset_tree),
    ("POST", f"/api/datasets/{ID}/paths-info/(?P<revision>[^/]+)", _Handler._paths_info),
    ("GET", f"/datasets/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
    ("GET", "/api/agent-harnesses", _Handler._no_such_page),  # asked for by some clients, whatever they do
    ("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
]
WRITING = {_Handler._create, _Handler._may_write, _Handler._preupload, _Handler._commit, _Handler._lfs_batch}


def metadata_errors(card: str) -> list[str]:
    """What the Hub would refuse in a model card's metadata: documented fields of another type or unknown value."""
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if match is None:
        return []
    metadata = yaml.safe_load(match[1])
    errors = []
    for name, known in [("license", LICENSES), ("pipeline_tag", PIPELINE_TAGS)]:
        if name in metadata and metadata[name] not in known:
            errors.append(f'"{name}" must be one of {sorted(known)}, not {metadata[name]!r}')
    for name in ("tags", "datasets", "metrics"):
        values = metadata.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be a list of strings')
    for model in metadata.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[].name" must be a string')
        for result in model["results"]:
            errors.extend(_result_errors(result))
    return errors


def _result_errors(result: dict) -> list[str]:
    wanted = [("task", ["type"]), ("dataset", ["type", "name"])]
    errors = [
        f'"model-index[].results[].{part}.{field}" must be a string'
        for part, fields in wanted
        for field in fields
        if not isinstance(result.get(part, {}).get(field), str)
    ]
    for metric in result.get("metrics", [{}]):
        if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
            errors.append('"model-index[].results[].metrics[]" need a string `type` and a number as `value`')
    return errors


def hub_snippets(repo_id: str, pipeline_tag: str | None) -> list[str]:
    """What the Hub's page of a model with code of its own offers to copy: a pipeline where it has a tag, its class."""
    load = f'"{repo_id}", trust_remote_code=True'
    pipe = f'from transformers import pipeline\n\npipe = pipeline("{pipeline_tag}", model={load})'
    model = f'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained({load}, dtype="auto")'
    return [*([pipe] if pipeline_tag else []), model]


def validate_cards_here() -> None:
    """Before 2.1, huggingface_hub asks the real Hub whether a card is valid, whatever HF_ENDPOINT says."""
    from huggingface_hub import constants, repocard

    session = repocard.get_session()
    post = session.post
    session.post = lambda url, **options: post(url.replace("https://huggingface.co", constants.ENDPOINT), **options)


@contextmanager
def running_hub():
    """A running [`HubStandIn`]; when it stops, every request must have been one that it knows."""
    server = HubStandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
    assert not server.unknown_requests

"""A server that takes commits to dataset repositories as the Hugging Face Hub does, and keeps their files."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0" * 39 + "1"


class DatasetHub(ThreadingHTTPServer):
    """Dataset repositories in memory.

    Attributes:
        files: by repository, the content of each path.
        commits: by repository, the summary of each commit.
        private: repositories that were created as private.
        tokens: the authorization of every request.
        answers: status and message in place of an answer, by the beginning of the path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.commits, self.answers = {}, {}, {}
        self.private, self.tokens = set(), []

    @property
    def url(self) -> str:
        """Its address, for `huggingface_hub`."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def dataset_hub() -> Iterator[DatasetHub]:
    """Run a server while the block runs."""
    server = DatasetHub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: DatasetHub

    def do_HEAD(self) -> None:
        # /datasets/USER/NAME/resolve/main/FILE
        parts = self.path.strip("/").split("/")
        repository, name = "/".join(parts[1:3]), "/".join(parts[5:])
        if name in self.server.files.get(repository, {}):
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Content-Length": "1"}
            return self._send(200, {}, headers)
        return self._send(404, {}, {"X-Error-Code": "EntryNotFound"})

    def do_GET(self) -> None:
        self._send(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.append(self.headers.get("Authorization"))
        for start, (status, message) in self.server.answers.items():
            if self.path.startswith(start):
                return self._send(status, {"error": message})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        repository = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            return self._send(200, {"files": files})
        assert "/commit/" in self.path, self.path
        return self._commit(repository, body)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""

    def _create(self, asked: dict) -> None:
        repository = f"{asked['organization']}/{asked['name']}"
        status = 409 if repository in self.server.files else 200
        self.server.files.setdefault(repository, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repository)
        self._send(status, {"url": f"{self.server.url}/datasets/{repository}"})

    def _commit(self, repository: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.files[repository][line["value"]["path"]] = content
        summaries = [line["value"]["summary"] for line in lines if line["key"] == "header"]
        self.server.commits.setdefault(repository, []).extend(summaries)
        url = f"{self.server.url}/datasets/{repository}/commit/{COMMIT}"
        self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _send(self, status: int, document: dict, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

"""A server that answers as the Hugging Face hub does, for repositories that are folders on this disk."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

COMMIT = "0" * 39 + "1"


class HubServer(ThreadingHTTPServer):
    """Serves `root/ORGANISATION/NAME`, and remembers what it was asked for.

    Attributes:
        root: the folder of the repositories.
        asked: "METHOD path" of every request.
        refused: file names that are answered with 429.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked, self.refused = root, [], set()

    @property
    def url(self) -> str:
        """Its address, for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """Run a server while the block runs."""
    server = HubServer(root)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_for_client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve `folder/hub` to the hub's client, whose cache on this machine is empty, while the block runs."""
    constants = huggingface_hub.constants
    with hub_server(folder / "hub") as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own retries
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._tell_of("/".join(parts[2:4]), "tree" in parts, with_body)
        repository, file = "/".join(parts[:2]), self.server.root.joinpath(*parts[:2], *parts[4:])
        if file.name in self.server.refused:
            return self._send(429, b"too many requests", {}, with_body)
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": _missing(self.server.root / repository)}, with_body)
        data = file.read_bytes()
        # As on the hub, large files are named by their SHA-256.
        large = file.suffix in (".safetensors", ".bin")
        digest = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, with_body)

    def _tell_of(self, repository: str, tree: bool, with_body: bool) -> None:
        folder = self.server.root / repository
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if tree:
            listed = [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
            return self._send(200, json.dumps(listed).encode(), {}, with_body)
        answer = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
        return self._send(200, json.dumps(answer).encode(), {}, with_body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def _missing(repository: Path) -> str:
    return "EntryNotFound" if repository.is_dir() else "RepoNotFound"

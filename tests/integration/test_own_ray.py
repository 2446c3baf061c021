"""Who can reach the Ray that a local run starts: nobody from the network, and nobody without its token."""

import http
import http.client
import ipaddress
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from corpus import demo_job
from light_annotator import light
from waiting import PATIENCE_S

from pipeline.job import prepare_job
from pipeline.run import run_job

CALLS = "import ray._raylet as r; r.GcsClient(address='{}').internal_kv_keys(b'', timeout=30)"


def listening():
    """Addresses and ports at which this process and what it started wait for connections."""
    this = psutil.Process()
    return {
        (process.name(), *connection.laddr)
        for process in (this, *this.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def call(address, **environment):
    """Ask the cluster something from a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", CALLS.format(address)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def files_with(token):
    """Files of Ray's own folder, its logs among them, that hold the token."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if token.encode() in path.read_bytes()]


def page_at(port):
    """What a browser gets there without the token; empty where it is refused, or where nobody speaks HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.read().decode() if answer.status == http.HTTPStatus.OK else ""
    except http.client.HTTPException:
        return ""
    finally:
        connection.close()


class LooksAround:
    """Progress that looks once, when a worker is ready, at what listens and who is answered."""

    def __init__(self):
        self.open, self.answers, self.written, self.pages = set(), {}, [], []

    def say(self, line):
        pass

    def update(self, state):
        if state.workers_ready and not self.open:
            self.open = listening()
            self.written = files_with(os.environ["RAY_AUTH_TOKEN"])
            self.pages = [page for _, _, port in self.open if (page := page_at(port))]
            address = ray.get_runtime_context().gcs_address
            self.answers = {
                "with the token": call(address),
                "with another token": call(address, RAY_AUTH_TOKEN="f" * 64),
                "without token": call(address, RAY_AUTH_MODE="disabled"),
            }


def is_loopback(address):
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


@pytest.mark.slow
def test_a_local_run_answers_nobody_on_the_network_and_nobody_without_its_token(tmp_path, monkeypatch):
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("HOME", str(tmp_path))
    tars = [tmp_path / f"{name}.tar" for name in "abc"]
    for tar in tars:
        tar.write_bytes(b"")
    config = demo_job(tars, tmp_path / "out", run={"workers": 1, "progress_interval_s": 0.1})
    found = LooksAround()
    run_job(prepare_job(config), found, light)
    assert {name for name, *_ in found.open} >= {"gcs_server", "raylet"}
    assert [line for line in found.open if not is_loopback(line[1])] == []
    assert found.answers["with the token"].returncode == 0, found.answers["with the token"].stderr
    for who in ("with another token", "without token"):
        assert found.answers[who].returncode != 0
        assert re.search("unauthenticated", found.answers[who].stderr, re.IGNORECASE)
    assert found.written == []
    assert all(page.startswith("# HELP") for page in found.pages), "nothing but metrics is shown to all"
    assert not (tmp_path / ".ray").exists()

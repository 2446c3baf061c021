"""The Ray that a local run starts accepts no caller from the network, and none without its token."""

import http
import http.client
import ipaddress
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipeline.run.job import prepare_job
from pipeline.run.runner import run_job
from tests.helpers.corpus import demo_job
from tests.helpers.light_annotator import light
from tests.helpers.processes import python_path
from tests.helpers.waiting import PATIENCE_S, TEST_PATIENCE_S

CALLS = "import ray._raylet as r; r.GcsClient(address='{}').internal_kv_keys(b'', timeout=30)"


def listening():
    """Addresses and ports at which this process and what it started wait for connections."""
    import psutil  # which comes with ray, and is found once that is imported

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


class Observer:
    """Progress that, once a worker is ready, lists what listens and tries calls with and without token."""

    def __init__(self):
        self.found = {}

    def say(self, line):
        pass

    def update(self, state):
        if state.workers_ready and not self.found:
            address = ray.get_runtime_context().gcs_address
            opened = sorted(listening())
            calls = {
                "with the token": call(address),
                "with another token": call(address, RAY_AUTH_TOKEN="f" * 64),
                "without token": call(address, RAY_AUTH_MODE="disabled"),
            }
            self.found = {
                "open": opened,
                "answers": {who: (answer.returncode, answer.stderr) for who, answer in calls.items()},
                "written": [str(path) for path in files_with(os.environ["RAY_AUTH_TOKEN"])],
                "pages": [page for _, _, port in opened if (page := page_at(port))],
            }


def is_loopback(address):
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def main():
    """Run a job of three shards in a folder and print what was seen meanwhile, as the last line."""
    folder = Path(sys.argv[1])
    tars = [folder / f"{name}.tar" for name in "abc"]
    for tar in tars:
        tar.write_bytes(b"")
    config = demo_job(tars, folder / "out", run={"workers": 1, "progress_interval_s": 0.1})
    seen = Observer()
    run_job(prepare_job(config), seen, light)
    print(json.dumps(seen.found))


@pytest.mark.slow
@pytest.mark.timeout(TEST_PATIENCE_S)
def test_a_local_run_answers_nobody_on_the_network_and_nobody_without_its_token(tmp_path):
    here = Path(__file__)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": python_path(),
        "HOME": str(tmp_path),
    }
    # a process of its own: Ray keeps the first token that a process has, and other tests start other Rays
    ran = subprocess.run(
        [sys.executable, str(here), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert {name for name, *_ in found["open"]} >= {"gcs_server", "raylet"}
    assert [line for line in found["open"] if not is_loopback(line[1])] == []
    code, output = found["answers"]["with the token"]
    assert code == 0, output
    for who in ("with another token", "without token"):
        code, output = found["answers"][who]
        assert code != 0
        assert re.search("unauthenticated", output, re.IGNORECASE)
    assert found["written"] == []
    assert all(page.startswith("# HELP") for page in found["pages"]), "nothing but metrics is shown to all"
    assert not (tmp_path / ".ray").exists()


if __name__ == "__main__":
    main()

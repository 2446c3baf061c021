"""A ray cluster of one machine, started as an administrator does, in processes of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.waiting import PATIENCE_S, wait_until


@dataclass(frozen=True)
class RayHead:
    """Where the cluster answers, and the environment in which commands reach it."""

    address: str
    dashboard_url: str
    metrics_url: str
    client_port: int
    environment: dict


def free_ports(number):
    """Ports that nobody listens on; skips the test, visibly, where none can be opened."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
            opened.listen()
        return [opened.getsockname()[1] for opened in sockets]
    except OSError as error:
        pytest.skip(f"no ports can be opened here: {error}")
    finally:
        for opened in sockets:
            opened.close()


@contextmanager
def ray_head(*, dashboard, gpus=0):
    """Start a head with 2 CPU cores that serves callers with this process's token; end it after the block.

    Args:
        dashboard: whether jobs can be submitted.
        gpus: GPUs that it claims to have.
    """
    gcs, web, metrics, client, agent = free_ports(5)
    # unix sockets below it: their paths may have 107 characters
    folder = tempfile.mkdtemp(prefix="lg-", dir="/tmp")
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "RAY_metrics_report_interval_ms": "500",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *(f"--metrics-export-port={metrics}", f"--temp-dir={folder}", "--num-cpus=2", f"--num-gpus={gpus}"),
        *(f"--object-store-memory={100 << 20}", f"--include-dashboard={'true' if dashboard else 'false'}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={web}", f"--ray-client-server-port={client}"),
        # its usual port may be taken by another Ray on this machine, and then no job is ever started
        f"--dashboard-agent-listen-port={agent}",
    ]
    log = Path(folder) / "head.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for port in (gcs, *([web] if dashboard else [])):
            wait_until(lambda port=port: is_answered(port), log.read_text, process)
        if dashboard:
            wait_until_jobs_are_taken(f"http://127.0.0.1:{web}", environment, process)
        yield RayHead(
            f"127.0.0.1:{gcs}",
            f"http://127.0.0.1:{web}",
            f"http://127.0.0.1:{metrics}/metrics",
            client,
            environment,
        )
    finally:
        process.terminate()
        try:
            process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def is_answered(port):
    """Whether something listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def wait_until_jobs_are_taken(dashboard_url, environment, process):
    """Wait for the agent that starts jobs: it registers some time after the dashboard listens."""
    command = ["ray", "job", "submit", "--address", dashboard_url, "--no-wait", "--", "true"]
    answers = []

    def is_taken():
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        answers.append(ended.stdout + ended.stderr)
        return ended.returncode == 0

    wait_until(is_taken, lambda: answers[-1], process)

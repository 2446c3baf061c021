"""A ray cluster of one machine, started as an administrator does, in processes of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class RayHead:
    """Where the cluster answers, and the environment in which commands reach it."""

    address: str
    dashboard_url: str
    metrics_url: str
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
def ray_head(*, dashboard, token=False):
    """Start a head with 2 CPU cores; end it with all its processes.

    Args:
        dashboard: whether jobs can be submitted.
        token: whether only callers with the token in RAY_AUTH_TOKEN are served.
    """
    gcs, web, metrics, client = free_ports(4)
    # unix sockets below it: their paths may have 107 characters
    folder = tempfile.mkdtemp(prefix="lg-", dir="/tmp")
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "RAY_metrics_report_interval_ms": "500",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token" if token else "disabled",
    }
    environment.pop("RAY_ADDRESS", None)
    if token:
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    command = [
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *(f"--metrics-export-port={metrics}", f"--temp-dir={folder}", "--num-cpus=2", "--num-gpus=0"),
        *(f"--object-store-memory={100 << 20}", f"--include-dashboard={'true' if dashboard else 'false'}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={web}", f"--ray-client-server-port={client}"),
    ]
    log = Path(folder) / "head.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for port in (gcs, *([web] if dashboard else [])):
            wait_until_answered(port, process, log)
        yield RayHead(
            f"127.0.0.1:{gcs}", f"http://127.0.0.1:{web}", f"http://127.0.0.1:{metrics}/metrics", environment
        )
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_answered(port, process, log):
    """Wait until something listens on a port."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}:\n{log.read_text()}")

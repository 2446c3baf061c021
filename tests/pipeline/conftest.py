"""Fixtures: the command line in this process, an object store on loopback, an environment without others."""

import pytest

from pipeline.output import footer_cache
from pipeline.storage import attempts, filesystems
from tests.helpers.command_line import run_legrad
from tests.helpers.object_servers import SECRET, Store


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user():
    """Keep nothing of the tests' folders in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footer_cache, "SETTLED_AFTER_S", float("inf"))
        yield


@pytest.fixture
def legrad(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments):
        code = run_legrad(monkeypatch, *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def only_loopback(monkeypatch):
    """Credentials of the store here, none of the machine's own settings, and short waits between attempts."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(attempts, "LONGEST_WAIT_S", 0.05)
    yield
    filesystems.forget_filesystems()


@pytest.fixture(scope="session")
def moto_port():
    """Port of an S3 service."""
    # Imported here: tests that need no store run without it.
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def store(moto_port):
    """The S3 service, looked at from outside."""
    return Store(moto_port)

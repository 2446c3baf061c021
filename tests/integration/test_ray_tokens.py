"""A Ray cluster that refuses the token of a run: one line, at once, that says where the token is from."""

import os
import subprocess
import sys

import pytest

from tests.helpers.ray_head import is_answered, ray_head
from tests.helpers.waiting import PATIENCE_S, wait_until

TOKEN, OTHER = "a" * 64, "b" * 64
CONNECT = """
import ray
from pipeline.errors import UserError
from pipeline.run.cluster import ray_session

try:
    with ray_session():
        print("connected:", len(ray.nodes()))
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def with_token():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        with ray_head(dashboard=False) as head:
            yield head


@pytest.fixture
def connect(tmp_path):
    """Return a function that connects in a process of its own; it returns what that process printed."""

    def run(head, **environment):
        kept = {key: value for key, value in head.environment.items() if not key.startswith("RAY_AUTH")}
        ended = subprocess.run(
            [sys.executable, "-c", CONNECT],
            # a home folder without a token
            env={**kept, "RAY_ADDRESS": head.address, "HOME": str(tmp_path), **environment},
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        for token in (TOKEN, OTHER):
            assert token not in ended.stdout + ended.stderr
        assert ended.stderr == ""
        return ended.stdout

    return run


def test_the_token_of_the_cluster_is_accepted(connect, with_token):
    assert connect(with_token, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) == "connected: 1\n"


def test_a_wrong_token_is_named_by_its_variable(connect, with_token):
    assert connect(with_token, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=OTHER) == (
        f"the Ray cluster of RAY_ADDRESS={with_token.address} refused the token in RAY_AUTH_TOKEN; "
        "it must be the token with which the cluster was started\n"
    )


@pytest.mark.slow
def test_a_wrong_token_is_named_by_its_file(connect, with_token, tmp_path):
    path = tmp_path / "token"
    path.write_text(OTHER)
    printed = connect(with_token, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))
    assert f"refused the token in the file {path} (RAY_AUTH_TOKEN_PATH)" in printed
    (tmp_path / ".ray").mkdir()
    path.rename(tmp_path / ".ray" / "auth_token")
    assert "refused the token in the file ~/.ray/auth_token" in connect(with_token, RAY_AUTH_MODE="token")


@pytest.mark.parametrize(("settings", "mode"), [({}, "not set"), ({"RAY_AUTH_MODE": "disabled"}, "disabled")])
def test_a_cluster_that_requires_a_token_says_how_to_give_one(connect, with_token, settings, mode):
    assert connect(with_token, **settings, RAY_AUTH_TOKEN=TOKEN) == (
        f"the Ray cluster of RAY_ADDRESS={with_token.address} requires a token, and this process sends none: "
        f"RAY_AUTH_MODE is {mode}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token with which the "
        "cluster was started\n"
    )


@pytest.mark.slow
def test_a_token_that_cannot_be_read_or_sent_is_reported(connect, with_token, tmp_path):
    gone = tmp_path / "gone"
    printed = connect(with_token, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(gone))
    assert f"RAY_AUTH_TOKEN_PATH: {gone} cannot be read, or is empty" in printed
    assert "there is none in RAY_AUTH_TOKEN or ~/.ray/auth_token" in connect(
        with_token, RAY_AUTH_MODE="token"
    )
    assert "other than printable ASCII" in connect(with_token, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="é")


@pytest.mark.slow
def test_a_server_for_ray_clients_refuses_a_wrong_token_as_well(connect, with_token):
    address = f"ray://127.0.0.1:{with_token.client_port}"
    wait_until(lambda: is_answered(with_token.client_port), lambda: address)
    printed = connect(with_token, RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=OTHER)
    assert f"RAY_ADDRESS={address} refused the token in RAY_AUTH_TOKEN" in printed


@pytest.mark.slow
def test_a_cluster_without_a_token_accepts_callers_with_one_and_without(connect, monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ray_head(dashboard=False) as head:
        assert connect(head) == "connected: 1\n"
        assert connect(head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=OTHER) == "connected: 1\n"

"""Addresses of clusters: who answers, who does not, and what is no address at all."""

import contextlib
import socket

import pytest

from pipeline.errors import UserError
from pipeline.run.cluster import (
    Machine,
    cause_of_death,
    check_address,
    find_machine,
    machine_is_lost,
    settle_token,
)


@contextlib.contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port():
    with listening() as port:
        return port


def test_an_address_at_which_somebody_listens_is_taken():
    with listening() as port:
        check_address(f"127.0.0.1:{port}")
        check_address(f"ray://localhost:{port}")


@pytest.mark.parametrize("address", ["auto", "local"])
def test_addresses_that_ray_finds_itself_are_left_to_it(address):
    check_address(address)


def test_an_address_at_which_nobody_listens_is_told_with_the_cause():
    address = f"127.0.0.1:{closed_port()}"
    with pytest.raises(UserError, match=rf"RAY_ADDRESS {address}: no ray cluster answers: .*refused"):
        check_address(address)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:many", "http://head:8265", "[::1"])
def test_what_is_no_address_is_refused_with_the_form_it_should_have(address):
    with pytest.raises(UserError, match="expected HOST:PORT of a ray cluster"):
        check_address(address)


def node(port, alive=True, node_id="n"):
    return {"NodeID": node_id, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Alive": alive}


def test_a_machine_whose_daemon_stops_answering_is_lost_before_ray_says_so():
    with listening() as port:
        machine = find_machine([node(1, node_id="other"), node(port)], "n")
        assert machine == Machine("n", "127.0.0.1", port)
        assert not machine_is_lost([node(port)], machine)
    assert machine_is_lost([node(port)], machine)


def test_a_machine_that_ray_has_given_up_is_lost():
    with listening() as port:
        machine = find_machine([node(port)], "n")
        assert machine_is_lost([node(port, alive=False)], machine)
        assert machine_is_lost([], machine)


def test_a_daemon_that_the_driver_could_never_reach_says_nothing_about_its_machine():
    port = closed_port()
    machine = find_machine([node(port)], "n")
    assert machine.port is None
    assert not machine_is_lost([node(port)], machine)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The actor died.\n\tpid: 7\nWorker exit detail: killed\nby a signal.", "killed by a signal."),
        ("Task was killed:\n  low memory", "Task was killed: low memory"),
        ("", "ValueError"),
        ("x" * 1000, "x" * 400),
    ],
)
def test_the_cause_of_a_workers_death_is_one_line_of_bounded_length(said, told):
    assert cause_of_death(ValueError(said)) == told


@pytest.mark.parametrize("said", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": ""}])
def test_a_ray_of_our_own_gets_a_token_that_nobody_can_guess_and_keeps_it(said):
    environ = dict(said)
    settle_token(environ)
    token = environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    settle_token(environ)
    assert environ["RAY_AUTH_TOKEN"] == token
    other = dict(said)
    settle_token(other)
    assert other["RAY_AUTH_TOKEN"] != token


@pytest.mark.parametrize(
    "said", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/my/token"}]
)
def test_what_the_environment_says_of_tokens_holds(said):
    environ = dict(said)
    settle_token(environ)
    assert environ == said

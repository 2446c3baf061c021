"""Cluster addresses, lost machines, and the token of a Ray that this process starts."""

import contextlib
import socket

import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.run.cluster import (
    Machine,
    Session,
    check_address,
    cpus_only,
    find_machine,
    loss_cause,
    machine_is_lost,
    placed_on,
    provide_token,
)
from pipeline.run.plan import MachineResources


@contextlib.contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port():
    with listening() as port:
        return port


def test_an_address_that_answers_is_accepted():
    with listening() as port:
        check_address(f"127.0.0.1:{port}")
        check_address(f"ray://localhost:{port}")


@pytest.mark.parametrize("address", ["auto", "local"])
def test_named_addresses_are_left_to_ray(address):
    check_address(address)


def test_an_address_that_does_not_answer_is_an_error_with_the_cause():
    address = f"127.0.0.1:{closed_port()}"
    with pytest.raises(
        UserError, match=rf"^cannot connect to a Ray cluster at {address} \(connection refused\)"
    ):
        check_address(address)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:many", "http://head:8265", "[::1"])
def test_a_malformed_address_is_an_error_with_the_expected_form(address):
    with pytest.raises(UserError, match="expected HOST:PORT of a Ray cluster"):
        check_address(address)


def node(port, alive=True, node_id="n"):
    return {"NodeID": node_id, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Alive": alive}


def test_a_machine_whose_daemon_stops_answering_is_lost_before_ray_reports_it():
    with listening() as port:
        machine = find_machine([node(1, node_id="other"), node(port)], "n")
        assert machine == Machine("n", "127.0.0.1", port)
        assert not machine_is_lost([node(port)], machine)
    assert machine_is_lost([node(port)], machine)


def test_a_machine_that_ray_reports_as_dead_is_lost():
    with listening() as port:
        machine = find_machine([node(port)], "n")
        assert machine_is_lost([node(port, alive=False)], machine)
        assert machine_is_lost([], machine)


def test_a_machine_whose_daemon_was_never_reachable_is_not_lost_for_that():
    port = closed_port()
    machine = find_machine([node(port)], "n")
    assert machine.port is None
    assert not machine_is_lost([node(port)], machine)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("The actor died.\n\tpid: 7\nWorker exit detail: killed\nby a signal.", "killed by a signal"),
        ("Task was killed:\n  low memory", "Task was killed: low memory"),
        ("", "ValueError"),
        ("x" * 1000, "x" * 400),
    ],
)
def test_the_cause_of_a_lost_worker_is_one_line_of_bounded_length(text, cause):
    assert loss_cause(ValueError(text)) == cause


@pytest.mark.parametrize(
    ("is_own", "gpus", "gpus_per_worker", "expected"),
    [
        (True, 0, 1, True),
        (True, 2, 1, False),
        (True, 2, 0, True),
        # a cluster without GPUs may get some
        (False, 0, 1, False),
        (False, 0, 0.5, False),
        (False, 2, 0, True),
    ],
)
def test_a_run_on_a_cluster_computes_on_cpus_only_where_that_is_asked_for(
    is_own, gpus, gpus_per_worker, expected
):
    run = RunConfig(gpus_per_worker=gpus_per_worker)
    machines = [MachineResources(8, node_id="head"), MachineResources(8, gpus, "other")]
    assert cpus_only(Session(is_own), machines, run) is expected


def test_a_worker_that_is_meant_for_a_machine_starts_on_no_other():
    assert placed_on("") == "DEFAULT"
    strategy = placed_on("ab" * 28)
    assert (strategy.node_id, strategy.soft) == ("ab" * 28, False)


@pytest.mark.parametrize("settings", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": ""}])
def test_a_ray_started_here_gets_a_random_token_that_stays(settings):
    environ = dict(settings)
    provide_token(environ)
    token = environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    provide_token(environ)
    assert environ["RAY_AUTH_TOKEN"] == token
    other = dict(settings)
    provide_token(other)
    assert other["RAY_AUTH_TOKEN"] != token


@pytest.mark.parametrize(
    "settings",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/my/token"}],
)
def test_token_settings_of_the_environment_are_respected(settings):
    environ = dict(settings)
    provide_token(environ)
    assert environ == settings

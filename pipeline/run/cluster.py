"""The Ray cluster of a run: start one here or connect to one, and find out whether its machines are alive."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.process import exit_on_sigterm
from pipeline.run.plan import MachineResources, no_devices_message, plan_workers
from pipeline.run.tokens import check_token, no_token

ADDRESS_TIMEOUT_S = 10.0
MACHINE_TIMEOUT_S = 1.0
MACHINES_INTERVAL_S = 1.0
GPU_WARNING_S = 60.0
# Ray's smallest share of a resource is 0.0001
SMALLEST_SHARE = 0.001
GPU_KIND_PREFIX = "accelerator_type:"
MAX_CAUSE_CHARACTERS = 400
LOCAL_OBJECT_STORE_BYTES = 128 << 20
# ray.init() finds these clusters itself
NAMED_ADDRESSES = ("local", "auto")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """This process's connection to Ray.

    Attributes:
        is_own: whether this process started Ray, on this machine alone: no machine joins it.
    """

    is_own: bool


@contextmanager
def ray_session() -> Iterator[Session]:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine; shut down after the block.

    Yields:
        What this process is connected to.

    Raises:
        UserError: RAY_ADDRESS is malformed, nothing answers there, the cluster refuses the token of this
            process, or Ray does not start.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    check_address(address)
    check_token(address)
    # Ray then leaves CUDA_VISIBLE_DEVICES of CPU workers unchanged, which will be its default
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address == "local":
            _start_ray_here()
        else:
            ray.init(address=address, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise no_token(os.environ) from error
    except (ConnectionError, RayError) as error:
        reason = _one_line(error)
        if address == "local":
            raise UserError(f"cannot start Ray on this machine ({reason})") from error
        raise _no_connection(address, reason) from error
    try:
        # a handler installed before ray.init() would never be called
        with exit_on_sigterm():
            yield Session(is_own=address == "local")
    finally:
        ray.shutdown()


def _start_ray_here() -> None:
    """Start Ray on loopback, with a token: a client that reaches Ray can run code."""
    provide_token(os.environ)
    constants = ray._private.ray_constants
    networked = constants.ENABLE_RAY_CLUSTER
    # as on macOS and Windows; Ray would replace an address of 127.0.0.1 by that of the network
    constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
        )
    finally:
        constants.ENABLE_RAY_CLUSTER = networked


def provide_token(environ: MutableMapping[str, str]) -> None:
    """Set a random token for a Ray that this process starts, unless the environment already chooses one.

    It stays in the environment of this process and its children, for later runs too. Without it Ray would
    write a token to the home folder, where others may read it, or reuse the one it finds there.

    Args:
        environ: environment variables; RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are respected.
    """
    uses_token = environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    if uses_token and not (environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH")):
        environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_address(address: str, timeout_s: float = ADDRESS_TIMEOUT_S) -> None:
    """Fail at once if nothing answers at a RAY_ADDRESS; Ray itself would retry for minutes.

    Args:
        address: HOST:PORT of a Ray cluster, ``ray://HOST:PORT``, ``auto`` or ``local``.
        timeout_s: longest wait for an answer.

    Raises:
        UserError: the address is malformed, or nothing accepts a connection there.
    """
    if address in NAMED_ADDRESSES:
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise _no_connection(address, (error.strerror or str(error)).lower()) from error


def _no_connection(address: str, reason: str) -> UserError:
    return UserError(
        f"cannot connect to a Ray cluster at {address} ({reason}); "
        "correct RAY_ADDRESS, or unset it to run on this machine"
    )


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.scheme in ("", "ray") and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise UserError(f"RAY_ADDRESS: expected HOST:PORT of a Ray cluster, auto or local, got {address!r}")


def machines_alive() -> list[MachineResources]:
    """Return the resources of each machine that is alive."""
    draining = _draining_machines()
    return [
        MachineResources(
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
            node["NodeID"],
            drains=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _draining_machines() -> Container[str]:
    # a private call, for Ray 2.60 has no other; without it, a machine that drains is used until it is gone
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except (AttributeError, RayError):
        return frozenset()


def cpus_only(session: Session, machines: Iterable[MachineResources], run: RunConfig) -> bool:
    """Return whether workers compute on CPUs, which a run on a cluster does only where the user asks for it.

    Args:
        session: the connection to Ray.
        machines: the machines that are alive.
        run: the configuration's run section.
    """
    return not run.gpus_per_worker or (session.is_own and not any(machine.gpus for machine in machines))


def run_on_each_kind_of_gpu(function: Callable[[], str], run: RunConfig) -> list[str]:
    """Run a function on a machine with each kind of GPU, beside whatever runs there; return the answers.

    Waits for a first machine with a GPU, as long as `run.wait_for_devices_s` allows, and without limit for a
    share of a GPU where other jobs use all of them.

    Args:
        function: runs in a process that sees one GPU.
        run: the configuration's run section.

    Returns:
        One answer for each kind of GPU; at least one.

    Raises:
        UserError: no machine with a GPU joined.
    """
    # more than nothing, so that Ray shows the process a GPU
    task = ray.remote(num_cpus=0, num_gpus=SMALLEST_SHARE)(function)
    answers: list[str] = []
    while not answers:
        _wait_for_a_gpu(run)
        calls = {
            task.options(resources=dict.fromkeys(kind, SMALLEST_SHARE)).remote(): kind
            for kind in _kinds_of_gpus()
        }
        answers = _answers(calls)
    return answers


def _kinds_of_gpus() -> set[frozenset[str]]:
    """Return the kinds of GPUs there are, each as the names of Ray's resources for it."""
    draining = _draining_machines()
    return {
        frozenset(name for name in node["Resources"] if name.startswith(GPU_KIND_PREFIX))
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU") and node["NodeID"] not in draining
    }


def _wait_for_a_gpu(run: RunConfig) -> None:
    if _kinds_of_gpus():
        return
    logger.warning(
        "Waiting for a GPU, at most %g s (run.wait_for_devices_s), to learn which precision it computes; "
        "set model.precision to skip this step",
        run.wait_for_devices_s,
    )
    ask = plan_workers(run, [], 1).ask
    # Ray's autoscaler sees a pending request as demand
    request = ray.remote(num_cpus=ask.cpus, num_gpus=ask.gpus)(_do_nothing).remote()
    until_s = time.monotonic() + run.wait_for_devices_s
    try:
        while not _kinds_of_gpus():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise UserError(
                    f"{no_devices_message(run, machines_alive())}; waited {run.wait_for_devices_s:g} s, the "
                    "limit of run.wait_for_devices_s"
                )
            time.sleep(min(left_s, MACHINES_INTERVAL_S))
    finally:
        ray.cancel(request)


def _do_nothing() -> None:
    pass


def _answers(calls: Mapping[Any, frozenset[str]]) -> list[str]:
    """Return the answers of calls, except where the last machine with a kind of GPU leaves meanwhile."""
    answered, pending = [], list(calls)
    while pending:
        ready, pending = ray.wait(pending, num_returns=len(pending), timeout=GPU_WARNING_S)
        answered += ready
        kinds = _kinds_of_gpus() if pending else set()
        pending = [call for call in pending if calls[call] in kinds]
        if pending:
            logger.warning(
                "waiting for a free GPU, to learn which precision it computes; set model.precision to skip "
                "this step"
            )
    return [str(answer) for answer in ray.get(answered)]


def placed_on(node_id: str) -> str | NodeAffinitySchedulingStrategy:
    """Return Ray's scheduling strategy for a worker that must start on a machine; on any if the id is empty.

    Ray never places the worker on another machine: its CPU cores are planned for this one.
    """
    return NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster, as seen when a worker on it became ready.

    Attributes:
        node_id: Ray's id of the machine.
        host: address of its Ray daemon.
        port: port of its Ray daemon; None if this process could not reach the daemon.
    """

    node_id: str = ""
    host: str = ""
    port: int | None = None


def find_machine(nodes: Iterable[Mapping[str, Any]], node_id: str) -> Machine:
    """Return the machine with an id among Ray's nodes, and check whether its daemon can be reached."""
    for node in nodes:
        if node["NodeID"] == node_id:
            machine = Machine(node_id, node["NodeManagerAddress"], node["NodeManagerPort"])
            return machine if _daemon_answers(machine) else Machine(node_id, machine.host)
    return Machine(node_id)


def machine_is_lost(nodes: Iterable[Mapping[str, Any]], machine: Machine) -> bool:
    """Return whether Ray reports a machine as dead, which takes a while, or its daemon no longer answers."""
    alive = any(node["NodeID"] == machine.node_id and node["Alive"] for node in nodes)
    return not alive or (machine.port is not None and not _daemon_answers(machine))


def _daemon_answers(machine: Machine) -> bool:
    try:
        socket.create_connection((machine.host, machine.port), MACHINE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def loss_cause(error: Exception) -> str:
    """Return why Ray lost a worker, in one line of bounded length."""
    return _one_line(error).rpartition("Worker exit detail: ")[2][:MAX_CAUSE_CHARACTERS].rstrip(".")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

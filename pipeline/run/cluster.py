"""Clusters of Ray: whether one answers, which Ray itself takes minutes to deny; the token of our own."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError

ADDRESS_TIMEOUT_S = 10.0
MACHINE_TIMEOUT_S = 1.0
CAUSE_CHARACTERS = 400
# ray looks for these clusters on its own
NAMED_ADDRESSES = ("local", "auto")


def settle_token(environ: MutableMapping[str, str]) -> None:
    """Give a Ray that this process starts a token, where the environment does not say otherwise.

    It stays in the environment of this process and its children, for later runs too. Ray itself would write
    one into the home, where others may read it, and take the one that it finds there.

    Args:
        environ: of the process; what is set of RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH holds.
    """
    asks_for_one = environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    if asks_for_one and not (environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH")):
        environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_address(address: str, timeout_s: float = ADDRESS_TIMEOUT_S) -> None:
    """Refuse a RAY_ADDRESS at which nobody answers.

    Args:
        address: HOST:PORT of a ray cluster, ``ray://HOST:PORT``, ``auto`` or ``local``.
        timeout_s: how long an answer may take.

    Raises:
        UserError: the address has another form, or nothing accepts a connection there.
    """
    if address in NAMED_ADDRESSES:
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS {address}: no ray cluster answers: {error}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.scheme in ("", "ray") and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise UserError(f"RAY_ADDRESS: expected HOST:PORT of a ray cluster, auto or local, got {address!r}")


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster, as a worker on it saw it when it was ready.

    Attributes:
        node_id: ray's name for it.
        host: address of its ray daemon.
        port: port of its ray daemon; None where the driver cannot reach it.
    """

    node_id: str = ""
    host: str = ""
    port: int | None = None


def find_machine(nodes: Iterable[Mapping[str, Any]], node_id: str) -> Machine:
    """The machine of that id among ray's nodes, and whether its daemon can be asked for a sign of life."""
    for node in nodes:
        if node["NodeID"] == node_id:
            machine = Machine(node_id, node["NodeManagerAddress"], node["NodeManagerPort"])
            return machine if _daemon_answers(machine) else Machine(node_id, machine.host)
    return Machine(node_id)


def machine_is_lost(nodes: Iterable[Mapping[str, Any]], machine: Machine) -> bool:
    """Whether a machine went away: ray says so, which takes it a while, or its daemon no longer answers."""
    alive = any(node["NodeID"] == machine.node_id and node["Alive"] for node in nodes)
    return not alive or (machine.port is not None and not _daemon_answers(machine))


def _daemon_answers(machine: Machine) -> bool:
    try:
        socket.create_connection((machine.host, machine.port), MACHINE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def cause_of_death(error: Exception) -> str:
    """What ray says of a worker's end, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rpartition("Worker exit detail: ")[2][:CAUSE_CHARACTERS]

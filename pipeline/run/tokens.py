"""Check that a Ray cluster accepts this process's token, and name the variable or file that it is from.

Without this check, Ray retries for 20 to 30 seconds and then reports that it cannot connect.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import grpc
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from pipeline.errors import UserError

ANSWER_TIMEOUT_S = 5.0
DEFAULT_FILE = "~/.ray/auth_token"
# calls that need the token and change nothing, with their requests: of a cluster, and of a server for ray://
_CLUSTER_CALL = ("/ray.rpc.NodeInfoGcsService/GetClusterId", b"")
_CLIENT_CALL = ("/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x03")


def check_token(address: str) -> None:
    """Fail at once if a cluster refuses the token of this process, or asks for one and there is none.

    Args:
        address: HOST:PORT of a Ray cluster, ``ray://HOST:PORT`` or ``auto``; for ``local`` nothing is done.

    Raises:
        UserError: the cluster refuses the token, or the token cannot be read or sent.
    """
    if address == "local":
        return
    token = _token(address)
    if not (token.isascii() and token.isprintable()):
        raise UserError(f"the token in {token_source(os.environ)} has characters other than printable ASCII")
    if _is_refused(address, token):
        raise _refusal(address, token, os.environ)


def _token(address: str) -> str:
    """Return the token that Ray would send to an address; empty if it would send none."""
    mode = os.environ.get("RAY_AUTH_MODE", "token" if address == "auto" else "disabled")
    if mode.lower() != "token":
        return ""
    try:
        token = str(AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise no_token(os.environ) from error
    if not token and "RAY_AUTH_MODE" in os.environ:
        raise no_token(os.environ)
    return token


def _is_refused(address: str, token: str) -> bool:
    """Return whether the server says so; every other failure is left to Ray to report."""
    method, request = _CLIENT_CALL if "://" in address else _CLUSTER_CALL
    try:
        server = canonicalize_bootstrap_address("auto") if address == "auto" else address
    except ConnectionError:
        server = None
    if not server:
        return False
    if server is None:
        return False
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(server.rpartition("://")[2]) as channel:
        try:
            channel.unary_unary(method)(request, timeout=ANSWER_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _refusal(address: str, token: str, environ: Mapping[str, str]) -> UserError:
    cluster = f"the Ray cluster of RAY_ADDRESS={address}"
    if token:
        return UserError(
            f"{cluster} refused the token in {token_source(environ)}; it must be the token with which the "
            "cluster was started"
        )
    return UserError(
        f"{cluster} requires a token, and this process sends none: RAY_AUTH_MODE is "
        f"{environ.get('RAY_AUTH_MODE') or 'not set'}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
        "token with which the cluster was started"
    )


def no_token(environ: Mapping[str, str]) -> UserError:
    """Return the error for a token that the environment asks for and that cannot be read."""
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not environ.get("RAY_AUTH_TOKEN"):
        return UserError(
            f"RAY_AUTH_TOKEN_PATH: {path} cannot be read, or is empty; it must be a file that contains the "
            "token of the Ray cluster"
        )
    return UserError(
        f"RAY_AUTH_MODE=token requires a token, and there is none in RAY_AUTH_TOKEN or {DEFAULT_FILE}; set "
        "RAY_AUTH_TOKEN to the token of the Ray cluster, or unset RAY_AUTH_MODE if the cluster has none"
    )


def token_source(environ: Mapping[str, str]) -> str:
    """Return the variable or file from which Ray takes the token, in Ray's own order."""
    if environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if path := environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"the file {path} (RAY_AUTH_TOKEN_PATH)"
    return f"the file {DEFAULT_FILE}"

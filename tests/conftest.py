"""Shared by all tests: shapes in `legrad` are checked, and random numbers do not depend on the order."""

from pipeline.process import skip_native_exit

# Before anything imports ray or torch: native threads once made a run that had passed end with code 139.
end_with = skip_native_exit()

from jaxtyping import install_import_hook  # noqa: E402

# Before anything imports legrad; a module imported earlier would go unchecked.
install_import_hook("legrad", "beartype.beartype")

import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """End the process with the exit code of the tests; a worker of xdist has to report first."""
    yield
    if not hasattr(session.config, "workerinput"):
        end_with(int(session.exitstatus))


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_arrives() -> Iterator[None]:
    """Take SIGINT, also in child processes: shells start background jobs with SIGINT ignored."""
    earlier_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier_handler)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> Iterator[None]:
    """Give every test the same random state, and leave the state outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

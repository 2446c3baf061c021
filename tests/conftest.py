"""Shared by all tests: shapes in `legrad` are checked, and random numbers do not depend on the order."""

from jaxtyping import install_import_hook

# Before anything imports legrad; a module imported earlier would go unchecked.
install_import_hook("legrad", "beartype.beartype")

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> Iterator[None]:
    """Give every test the same random state, and leave the state outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

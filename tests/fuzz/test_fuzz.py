"""No input ends the process, hangs, leaves files behind or is put together wrongly."""

import os
import random

import pytest

from tests.fuzz import harness
from tests.fuzz.counts import FAULTS, INPUTS

# of CPU time; the table counts from 2 s on, a test must not fail for what else the machine does
LIMIT_S = 20
SEED = 0
LONGER = float(os.environ.get("LEGRAD_FUZZ_TIMES", "10"))


@pytest.fixture(scope="module")
def some():
    return harness.fuzz(INPUTS, SEED)


@pytest.fixture(scope="module")
def many():
    """Other inputs than those of every run, LEGRAD_FUZZ_TIMES as many."""
    return harness.fuzz({name: int(count * LONGER) for name, count in INPUTS.items()}, SEED + 1)


def check(found, inputs):
    assert found.crashes == {}
    assert found.wrong_pairings == []
    assert found.leaks == []
    assert found.worst_s < LIMIT_S, f"input {max(found.cpu_s, key=found.cpu_s.get)}"
    assert found.inputs == inputs
    assert found.refused < inputs, "some are damaged so little that they can be read"


@pytest.mark.parametrize("name", INPUTS)
def test_foreign_bytes_are_read_or_refused(name, some):
    check(some[name], INPUTS[name])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", INPUTS)
def test_many_more_foreign_bytes_are_read_or_refused(name, many):
    check(many[name], int(INPUTS[name] * LONGER))


@pytest.mark.slow
def test_a_crash_a_leak_and_a_wrong_pairing_are_found_and_the_rest_is_tried_all_the_same():
    faults = [random.Random(f"{SEED}/self-test/{number}").choice(FAULTS) for number in range(10)]
    assert set(faults) == set(FAULTS)
    found = harness.fuzz({"self-test": len(faults)}, SEED)["self-test"]
    reported = {
        "error": "ZeroDivisionError",
        "segmentation fault": "Segmentation fault",
        "warning": "UserWarning: lenient",
    }
    assert found.inputs == len(faults)
    assert sorted(found.crashes) == [number for number, fault in enumerate(faults) if fault in reported]
    assert all(reported[faults[number]] in crash for number, crash in found.crashes.items())
    assert found.wrong_pairings == [number for number, fault in enumerate(faults) if fault == "wrong pairing"]
    leaks = [number for number, fault in enumerate(faults) if fault == "file"]
    assert [int(leak.split(":")[0]) for leak in found.leaks] == leaks

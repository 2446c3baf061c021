"""The balance of a job: a busy worker begins no shard with which it would end after all others."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.balance import Balance, Load


def test_with_much_left_any_shard_may_be_begun():
    loads = [Load(10.0), Load(10.0)]
    assert Balance(loads, bytes_in_queue=1000.0).most_further_bytes(loads[0]) == 500.0


def test_a_worker_with_a_shard_that_will_end_last_begins_no_other():
    giant, *others = [Load(400.0), *[Load(20.0)] * 7]
    balance = Balance([giant, *others], bytes_in_queue=80 * 20 - 140.0)
    assert balance.most_further_bytes(giant) < 0
    assert balance.most_further_bytes(others[0]) > 20.0


def test_a_faster_worker_may_begin_more():
    fast, slow = Load(10.0, bytes_per_s=3.0), Load(10.0, bytes_per_s=1.0)
    balance = Balance([fast, slow], bytes_in_queue=60.0)
    assert balance.most_further_bytes(fast) == 50.0
    assert balance.most_further_bytes(slow) == 10.0


def test_a_worker_of_unknown_speed_counts_as_a_usual_one():
    loads = [Load(0.0, bytes_per_s=2.0), Load(0.0, bytes_per_s=4.0), Load(0.0)]
    assert Balance(loads, bytes_in_queue=90.0).most_further_bytes(loads[2]) == 30.0


@given(
    loads=st.lists(
        st.builds(Load, st.floats(0, 1e9), st.none() | st.floats(1.0, 1e6)), min_size=1, max_size=20
    ),
    queued=st.floats(0, 1e9),
)
def test_what_all_workers_may_begin_is_no_more_than_what_is_left(loads, queued):
    balance = Balance(loads, queued)
    further = sum(balance.most_further_bytes(load) for load in loads)
    assert further <= queued * (1 + 1e-6) + 1e-3 * sum(load.bytes_left + 1 for load in loads)

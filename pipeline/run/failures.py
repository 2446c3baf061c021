"""Tell a failure of one machine from one of the output folder or of all machines, which ends the run."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.errors import OutputError, ScratchError
from pipeline.run.hosting import Place

FIRST_PAUSE_S = 2.0
LEAST_FAILURES_IN_A_ROW = 4
# with the pauses between them, 30 s beyond the store's own repeated requests
MOST_REFUSALS_IN_A_ROW = 5


class FailuresInARow:
    """Counts failures that are no shard's, until some shard is done.

    Attributes:
        paused_until_s: until then no shard is begun, because the output folder cannot be written.
    """

    def __init__(self) -> None:
        self.paused_until_s = 0.0
        self._of_machines = 0
        self._of_output = 0
        # since a shard was last done
        self._failing_machines: set[str] = set()
        self._done_s: dict[Place, float] = {}

    def shard_done(self, place: Place, now_s: float) -> None:
        """Record that a place has finished and published a shard."""
        self._of_machines = self._of_output = 0
        self._failing_machines.clear()
        self._done_s[place] = now_s

    def machine_failed(
        self, place: Place, at_work: Collection[str], error: ScratchError, workers: int
    ) -> None:
        """Count a failure of a machine, such as a full temporary disk.

        Args:
            place: where it failed.
            at_work: the machines with shards in flight, or on which a worker loads its model.
            error: the failure.
            workers: number of workers that are ready.

        Raises:
            ScratchError: the error, if so many machines failed that none of them can be the cause.
        """
        self._of_machines += 1
        if self._some_may_succeed(place, at_work):
            return
        if self._of_machines >= max(LEAST_FAILURES_IN_A_ROW, 2 * workers):
            raise error

    def output_refused(
        self, place: Place, at_work: Collection[str], begun_s: float, error: OutputError, now_s: float
    ) -> bool:
        """Count a shard that could not be published; nothing is begun for a moment, longer each time.

        What was begun before the pause says nothing new, however many shards that is.

        Args:
            place: where it was annotated.
            at_work: the machines with shards in flight, or on which a worker loads its model.
            begun_s: when it was assigned.
            error: why it could not be published.
            now_s: the time.

        Returns:
            Whether only this place is concerned, because another one has published a shard since then, or a
            machine is at work that has not been refused yet.

        Raises:
            OutputError: the error, after several pauses without a success.
        """
        others_succeed = any(done_s > begun_s for other, done_s in self._done_s.items() if other != place)
        if self._some_may_succeed(place, at_work) or others_succeed:
            return True
        if now_s >= self.paused_until_s:
            self._of_output += 1
            if self._of_output >= MOST_REFUSALS_IN_A_ROW:
                raise error
            self.paused_until_s = now_s + FIRST_PAUSE_S * 2 ** (self._of_output - 1)
        return False

    def _some_may_succeed(self, failing: Place, at_work: Collection[str]) -> bool:
        """Add a failing machine; return whether one is at work that has not failed since the last success."""
        self._failing_machines.add(failing.machine_id)
        return not self._failing_machines.issuperset(at_work)

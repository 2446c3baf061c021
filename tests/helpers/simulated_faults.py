"""Faults of a simulated cluster: each says at which places and shards it strikes, and what happens there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.run.hosting import Place
from pipeline.run.worker import LoadOutcome
from pipeline.storage import ShardSource

Status = Literal["retry", "output", "machine", "device"]


@dataclass(frozen=True)
class Dies:
    """The worker's process ends."""

    after_s: float
    cause: str


@dataclass(frozen=True)
class Fails:
    """The attempt ends with a status; with `device`, every later one of the worker does too."""

    after_s: float
    status: Status
    message: str


@dataclass(frozen=True)
class Hangs:
    """The attempt makes no progress any more; with `freezes_worker`, the worker answers nothing."""

    after_s: float
    freezes_worker: bool = False


Effect = Dies | Fails | Hangs


def anywhere(place: Place) -> bool:
    """Every place."""
    return True


def at(machine_id: str, device: str | None = None) -> Callable[[Place], bool]:
    """Return whether a place is on a machine, and on a device of it where one is named."""

    def is_there(place: Place) -> bool:
        return place.machine_id == machine_id and device in (None, place.device)

    return is_there


@dataclass
class Fault:
    """What strikes at certain places and shards, a limited number of times.

    Attributes:
        where: the places; default: all.
        shards: ids of the shards; None: all.
        times: how often it strikes; None: always.
        struck: how often it has.
    """

    where: Callable[[Place], bool] = anywhere
    shards: frozenset[str] | None = None
    times: int | None = None
    struck: int = field(default=0, init=False)

    def on_loading(self, place: Place) -> LoadOutcome | Dies | Hangs | None:
        """Return what happens instead of a loaded model; None: nothing."""
        return None

    def on_taking(self, place: Place, shard: ShardSource, now_s: float) -> Effect | None:
        """Return what will happen to an attempt that begins; None: nothing."""
        return None

    def on_publishing(self, place: Place, shard: ShardSource, now_s: float) -> Fails | Hangs | None:
        """Return what happens instead of publishing; None: nothing."""
        return None

    def strikes(self, place: Place, shard: ShardSource | None = None) -> bool:
        """Count one strike if the place and the shard are concerned, and return whether they are."""
        if self.times is not None and self.struck >= self.times:
            return False
        if not self.where(place) or (self.shards and shard and shard.shard_id not in self.shards):
            return False
        self.struck += 1
        return True


@dataclass
class KillsWorker(Fault):
    """A worker is killed so long after it has taken a shard: a bad place, or a poison shard."""

    after_s: float = 1.0
    cause: str = "SIGKILL"

    def on_taking(self, place: Place, shard: ShardSource, now_s: float) -> Effect | None:
        return Dies(self.after_s, self.cause) if self.strikes(place, shard) else None


@dataclass
class FailsAttempt(Fault):
    """An attempt ends with a status: a full temporary disk, a broken CUDA context, an unreadable shard."""

    status: Status = "retry"
    after_s: float = 1.0
    message: str = "simulated"

    def on_taking(self, place: Place, shard: ShardSource, now_s: float) -> Effect | None:
        return Fails(self.after_s, self.status, self.message) if self.strikes(place, shard) else None


@dataclass
class HangsAttempt(Fault):
    """An attempt makes no progress after a while; with `freezes_worker`, the worker answers nothing."""

    after_s: float = 1.0
    freezes_worker: bool = False

    def on_taking(self, place: Place, shard: ShardSource, now_s: float) -> Effect | None:
        return Hangs(self.after_s, self.freezes_worker) if self.strikes(place, shard) else None


@dataclass
class RefusesPuts(Fault):
    """The output store refuses what workers publish, at certain times."""

    from_s: float = 0.0
    until_s: float = float("inf")
    message: str = "SLOW_DOWN"

    def on_publishing(self, place: Place, shard: ShardSource, now_s: float) -> Fails | None:
        refuses = self.from_s <= now_s < self.until_s and self.strikes(place, shard)
        return Fails(0.0, "output", self.message) if refuses else None


@dataclass
class HangsPublishing(Fault):
    """The output store never answers."""

    def on_publishing(self, place: Place, shard: ShardSource, now_s: float) -> Hangs | None:
        return Hangs(0.0) if self.strikes(place, shard) else None


@dataclass
class FailsToLoad(Fault):
    """A worker cannot load its model, is killed while it does, or never ends."""

    outcome: LoadOutcome | Dies | Hangs = field(default_factory=lambda: LoadOutcome("simulated"))

    def on_loading(self, place: Place) -> LoadOutcome | Dies | Hangs | None:
        return self.outcome if self.strikes(place) else None

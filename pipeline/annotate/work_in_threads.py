"""Choose the work on samples that a job needs, for the process or thread that does it."""

from __future__ import annotations

from pipeline.annotate.sample_work import SampleWork, WorkSettings
from pipeline.annotate.stored_samples import StoredWork
from pipeline.shards.decode_memory import Room


def work_of(settings: WorkSettings, room: Room) -> SampleWork | StoredWork:
    """Return the work on samples: on those of shards, or on those with stored maps.

    Args:
        settings: of the job.
        room: called with the bytes that a large image takes; held while it takes them.
    """
    takes_stored_maps = settings.config.input.maps is not None
    return StoredWork(settings, room) if takes_stored_maps else SampleWork(settings, room)

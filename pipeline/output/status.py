"""The state of an output folder: shards by outcome, samples, and why a job is not complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config.schema import RunConfig
from pipeline.errors import DamagedFileError
from pipeline.output.counts import ShardCounts, error_kinds_text, total_counts
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.records import FooterRecord
from pipeline.output.runs import MAX_WORST_SHARDS, RunRecord, RunState, latest_run
from pipeline.output.schema import ShardRow
from pipeline.text import printable

# finished samples, and finished shards above the budget, before a run may stop early
BUDGET_SAMPLES = 1000
BUDGET_SHARDS = 3


@dataclass(frozen=True)
class FolderState:
    """The shards of a job by their state in its output folder; each shard has one state.

    Attributes:
        listed: rows of OUT/shards.parquet, by shard id.
        done: ids of shards whose two files belong together and to the job.
        damaged: ids of published shards whose archive could not be read to its end.
        failed: ids of shards that were given up.
        left: ids of shards still to be annotated, including those with mismatched files.
        mismatched: by shard id, why its two files are not what the job wrote.
        strays: files in `annotations/` that belong to no listed shard.
        counts: outcomes of the samples by id of done and damaged shards; None if footers were not read.
    """

    listed: Mapping[str, ShardRow]
    done: tuple[str, ...]
    damaged: tuple[str, ...]
    failed: tuple[str, ...]
    left: tuple[str, ...]
    mismatched: Mapping[str, str]
    strays: tuple[str, ...]
    counts: Mapping[str, ShardCounts] | None

    @property
    def counts_by_url(self) -> dict[str, ShardCounts]:
        """Outcomes of the samples by URL of done and damaged shards; empty if footers were not read."""
        return {self.listed[name]["shard"]: counts for name, counts in (self.counts or {}).items()}


def read_state(
    folder: OutputFolder,
    rows: Sequence[ShardRow],
    config_hash: str,
    *,
    max_footers: int | None = None,
    is_cached: bool = False,
) -> FolderState:
    """Read the state of every shard of a job; nothing is changed.

    Args:
        folder: the output folder.
        rows: rows of its OUT/shards.parquet.
        config_hash: of the job.
        max_footers: if more shards are published, their footers are not read, so that mismatched files count
            as done and samples are not counted. None: no limit.
        is_cached: whether footers of unchanged files are kept in the user's cache folder between calls.

    Raises:
        OutputError: the folder cannot be listed.
    """
    listed = {row["shard_id"]: row for row in rows}
    ids = folder.all_ids()
    published = [row for row in rows if row["shard_id"] in ids.annotations]
    counts: dict[str, ShardCounts] | None = None
    mismatched: dict[str, str] = {}
    if max_footers is None or len(published) <= max_footers:
        found = folder.checked_footers(published, config_hash, is_cached=is_cached)
        footers = {name: footer for name, footer in found.items() if isinstance(footer, FooterRecord)}
        mismatched = {
            name: str(error) for name, error in found.items() if isinstance(error, DamagedFileError)
        }
        counts = {name: footer.counts() for name, footer in footers.items()}
        damaged = frozenset(name for name, footer in footers.items() if footer.state == "damaged")
        ids = replace(ids, annotations=ids.annotations - set(mismatched), damaged=damaged)
    states = ids.states_of(listed)
    return FolderState(
        listed=listed,
        done=tuple(shard_id for shard_id in listed if shard_id in states.done),
        damaged=tuple(shard_id for shard_id in listed if shard_id in states.damaged),
        failed=tuple(sorted(states.failed)),
        left=tuple(sorted(states.left)),
        mismatched=mismatched,
        strays=folder.stray_annotations(listed),
        counts=counts,
    )


@dataclass(frozen=True)
class OutputStatus:
    """What `legrad status` shows of an output folder.

    Attributes:
        shards_total: shards of the job.
        done: ids of shards whose two files belong together and to the job.
        damaged: URL and reason of published shards whose archive could not be read to its end.
        failed: URL and last error of shards given up.
        left: ids of shards still to be annotated.
        mismatched: ids of shards whose two files do not belong together or to the job, and why.
        counts: outcomes of the samples of done and damaged shards.
        shortfall: why the job is not complete although no shard is left or failed; empty otherwise.
        succeeded: whether OUT/_SUCCESS exists.
        run: the record of the newest run; None if there is none.
    """

    shards_total: int
    done: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    mismatched: tuple[tuple[str, str], ...]
    counts: ShardCounts
    shortfall: str
    succeeded: bool
    run: RunRecord | None = None

    @property
    def complete(self) -> bool:
        """Whether `legrad annotate` would have nothing to do and nothing to complain about."""
        return not (self.failed or self.left or self.shortfall)


def read_status(output_dir: str) -> OutputStatus:
    """Read the status of an output folder; nothing is changed.

    Raises:
        UserError: the folder is not the output of a job.
    """
    folder = OutputFolder(output_dir)
    job = folder.job()
    state = read_state(folder, folder.shard_rows(), job.config_hash, is_cached=True)
    counts = total_counts((state.counts or {}).values())
    return OutputStatus(
        shards_total=len(state.listed),
        done=state.done,
        damaged=tuple((state.listed[name]["shard"], folder.damage_reason(name)) for name in state.damaged),
        failed=tuple((state.listed[name]["shard"], folder.failure_reason(name)) for name in state.failed),
        left=state.left,
        mismatched=tuple(state.mismatched.items()),
        counts=counts,
        shortfall=shortfall(folder.config(job).run, counts, state),
        succeeded=folder.has_success(),
        run=latest_run(folder),
    )


def shortfall(run: RunConfig, counts: ShardCounts | None, state: FolderState) -> str:
    """Return why a job is not complete although no shard is left or failed; empty if it is complete.

    Args:
        run: section `run` of its configuration.
        counts: outcomes of its samples; None if they were not counted.
        state: of its output folder.
    """
    if state.strays:
        return (
            f"{len(state.strays):,} file(s) in {ANNOTATIONS}/ belong to no listed shard, such as "
            f"{printable(state.strays[0])}; readers of the folder count their rows too"
        )
    if state.damaged and not run.accept_damaged:
        return f"{len(state.damaged):,} shard(s) are damaged; run.accept_damaged is false"
    if counts is None or (state.left and not counts.samples_in):
        return ""
    return reason_at_end(run, counts, state.counts_by_url)


def reason_to_stop(run: RunConfig, state: RunState) -> str:
    """Return why a run should stop early; empty if it should continue.

    Only finished shards count, and one or two bad shards stop nothing: a job whose bad shards come first
    would otherwise never reach the others.
    """
    if run.max_failed_shards is not None and state.shards_failed > run.max_failed_shards:
        return f"{state.shards_failed} shards given up; run.max_failed_shards is {run.max_failed_shards}"
    if state.shards_over_budget < BUDGET_SHARDS or state.counts.samples_in < BUDGET_SAMPLES:
        return ""
    if not exceeds_budget(run, state.counts):
        return ""
    return _over_budget_text(run, state.counts, state.shards_over_budget, state.worst_shards)


def reason_at_end(
    run: RunConfig, counts: ShardCounts, counts_by_url: Mapping[str, ShardCounts] | None = None
) -> str:
    """Return why a job is not complete; empty if it is. Independent of the job's size.

    Args:
        run: section `run` of its configuration.
        counts: outcomes of its samples.
        counts_by_url: the same for each of its shards, to name the worst.
    """
    if not counts.samples_in:
        return f"no sample could be read ({error_kinds_text(counts) or 'the shards are empty'})"
    if not exceeds_budget(run, counts):
        return ""
    over_budget = [
        (url, shard.failed, shard.samples_in)
        for url, shard in (counts_by_url or {}).items()
        if exceeds_budget(run, shard)
    ]
    return _over_budget_text(run, counts, len(over_budget), worst_first(over_budget))


def exceeds_budget(run: RunConfig, counts: ShardCounts) -> bool:
    """Return whether more samples failed than `run.error_budget` allows."""
    return counts.failed > run.error_budget * counts.samples_in


def worst_first(shards: Iterable[tuple[str, int, int]]) -> tuple[tuple[str, int, int], ...]:
    """Return the MAX_WORST_SHARDS shards of which the largest share of samples failed, the worst first.

    Args:
        shards: URL, failed samples and samples (at least one) of each shard.
    """
    worst = sorted(shards, key=lambda shard: (-shard[1] / shard[2], -shard[1], shard[0]))
    return tuple(worst[:MAX_WORST_SHARDS])


def _over_budget_text(
    run: RunConfig, counts: ShardCounts, shards_over_budget: int, worst: Sequence[tuple[str, int, int]]
) -> str:
    text = (
        f"{counts.failed} of {counts.samples_in} samples failed; run.error_budget is {run.error_budget:g} "
        f"({error_kinds_text(counts)})"
    )
    if not worst:
        return text
    names = ", ".join(f"{printable(url)} ({failed:,} of {samples:,})" for url, failed, samples in worst)
    return f"{text}; {shards_over_budget:,} shard(s) above it, worst first: {names}" + (
        ", ..." if shards_over_budget > len(worst) else ""
    )

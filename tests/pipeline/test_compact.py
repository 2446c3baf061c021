"""`legrad compact`: the same rows in fewer, larger files, for every reader; nothing is lost on the way."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import DamagedFileError, MismatchError, OutputError, UserError
from pipeline.evaluation.mask_scores import collect_written_masks
from pipeline.output import compaction, compaction_plan
from pipeline.output.compacted import PartRows
from pipeline.output.compaction import write_compaction
from pipeline.output.compaction_plan import plan_compaction
from pipeline.output.folder import OutputFolder
from pipeline.output.status import read_state, read_status
from pipeline.output.writer import ShardWriter
from pipeline.report.gallery import read_cards
from pipeline.report.scores import read_scores
from pipeline.report.totals import read_totals
from pipeline.run.job import prepare_job, record_failure
from pipeline.shards.ground_truth import list_truth_shards
from pipeline.shards.sample_error import SampleError
from pipeline.training import MaskDataset
from tests.helpers.compacted_jobs import assert_same_arrays, compacted, complete_job, rows_by_shard
from tests.helpers.corpus import demo_job, image_bytes
from tests.helpers.ground_truth_shards import label_map, scene_fields, write_shard
from tests.helpers.hostile_outputs import HOSTILE_OUTPUTS, good_output, target_of
from tests.helpers.output_readers import assert_all_readers_find
from tests.helpers.processes import REPOSITORY
from tests.helpers.report_jobs import error, row, varied_rows, write_job

ROWS = 30 + 2300 + 12


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return complete_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def new(out, tmp_path_factory):
    """Compacted, with groups that begin and end within shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "ROWS_PER_GROUP", 700)
        return compacted(out, tmp_path_factory.mktemp("new") / "new")


# what every reader finds


def sorted_rows(table):
    return sorted(map(repr, table))


ROWS_OF = {
    "pyarrow": lambda out: ds.dataset(out / "annotations").to_table().to_pylist(),
    "pandas": lambda out: pd.read_parquet(out / "annotations").drop(columns="bbox_xywh").to_dict("records"),
    "polars": lambda out: pl.read_parquet(out / "annotations" / "*.parquet").to_dicts(),
    "polars, the folder": lambda out: pl.read_parquet(out / "annotations").to_dicts(),
    "duckdb": lambda out: duckdb.sql(f"SELECT * FROM '{out}/annotations/*.parquet'").fetchall(),
    "duckdb, errors": lambda out: duckdb.sql(f"SELECT * FROM '{out}/errors/*.parquet'").fetchall(),
}


@pytest.mark.parametrize("reader", ROWS_OF)
def test_other_programs_find_the_same_rows(reader, out, new):
    assert sorted_rows(ROWS_OF[reader](new)) == sorted_rows(ROWS_OF[reader](out))


def test_every_reader_counts_the_rows_of_success(new):
    assert_all_readers_find(new, ROWS)


def test_all_rows_of_each_shard_are_the_same_in_the_same_order(out, new):
    found = rows_by_shard(new)
    assert found == rows_by_shard(out)
    assert sum(len(rows) for (table, _), rows in found.items() if table == "annotations") == ROWS


def test_groups_of_a_shard_and_single_rows_of_them_are_the_same(out, new):
    folders = OutputFolder(str(out)), OutputFolder(str(new))
    columns = ["key", "prompt_index", "mask", "bbox_xywh"]
    for shard_id in sorted(folders[0].ids("annotations")):
        with folders[0].open("annotations", shard_id) as one, folders[1].open("annotations", shard_id) as two:
            assert isinstance(two, PartRows)
            assert one.group_row_counts == two.group_row_counts
            for number, rows in enumerate(one.group_row_counts):
                some = [rows - 1, 0, rows // 2]
                for offsets in (None, some):
                    expected, found = (file.read_group(number, columns, offsets) for file in (one, two))
                    assert found.to_pylist() == expected.to_pylist()


def test_status_and_report_find_the_same(out, new):
    one, two = read_status(str(out)), read_status(str(new))
    assert two.complete
    assert one == two
    folders = OutputFolder(str(out)), OutputFolder(str(new))
    totals, copied_totals = (read_totals(folder, folder.job()) for folder in folders)
    assert totals == copied_totals
    scores, copied_scores = (read_scores(folder, totals.done, np.random.default_rng(0)) for folder in folders)
    assert_same_arrays(scores, copied_scores)
    some = range(0, len(scores), 97)
    assert repr(read_cards(folders[0], scores, some, set())) == repr(
        read_cards(folders[1], scores, some, set())
    )


def test_the_report_of_both_folders_shows_the_same_pictures(out, new, legrad):
    pages = []
    for folder in (out, new):
        page = folder.parent / f"{folder.name}.html"
        assert legrad("report", folder, "--to", page)[0] == 0
        pages.append(page.read_text().replace(str(folder), "FOLDER"))
    assert pages[0].count("data:image") == pages[1].count("data:image") > 10


def exported(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        # names the folder that was exported
        if path.is_file() and path.name != "export.json"
    }


@pytest.mark.parametrize(
    "form", [*(pytest.param(form, marks=pytest.mark.slow) for form in ("coco", "voc")), "webdataset"]
)
def test_exports_are_the_same_byte_for_byte(form, out, new, tmp_path, legrad):
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(f"thing number {number}" for number in range(30)))
    for name, folder in (("a", out), ("b", new)):
        words = ["export", folder, tmp_path / name, "--format", form]
        code, printed, shown = legrad(*words, *(() if form == "coco" else ["--classes", classes]))
        assert code in (0, 1), printed + shown
    assert exported(tmp_path / "a") == exported(tmp_path / "b")
    assert exported(tmp_path / "a")


@pytest.mark.slow
def test_an_export_of_the_compacted_folder_is_resumed(new, tmp_path, legrad):
    assert legrad("export", new, tmp_path / "a", "--format", "coco")[0] == 0
    code, printed, _ = legrad("export", new, tmp_path / "a", "--format", "coco")
    assert code == 0
    assert "0 shard(s) written, 4 done before" in printed


def test_training_gets_the_same_samples(out, new):
    def samples(folder):
        return [
            (sample["shard"], sample["key"], sample["masks"].sum().item())
            for sample in MaskDataset(folder, target="masks", seed=3)
        ]

    assert samples(new) == samples(out)
    assert len(samples(out)) > 40


def test_evaluation_scores_the_same(tmp_path):
    out = good_output(tmp_path)
    new = compacted(out, tmp_path / "new")
    fields = scene_fields(label_map({1: (4, 20, 4, 20)}, 48, 64), ["a dog"], [1])
    for name in ("0", "1"):
        (tmp_path / f"truth-{name}").mkdir()
        write_shard(
            tmp_path / f"truth-{name}" / f"{name}.tar", {f"key{index:03d}": fields for index in range(3)}
        )
    shards = list_truth_shards([f"{tmp_path}/truth-{name}/{name}.tar" for name in ("0", "1")])
    found = []
    for folder in (OutputFolder(str(out)), OutputFolder(str(new))):
        job = folder.job()
        found.append(
            collect_written_masks(folder, shards, folder.config(job).input, "classes", job.config_hash)
        )
    assert repr(found[0]) == repr(found[1])
    assert found[0].scenes
    assert not found[0].damaged_files


# files and their sizes


def test_files_are_filled_up_to_the_target_and_hold_whole_shards(tmp_path, monkeypatch):
    out = write_job(tmp_path / "job", [varied_rows(20) for _ in range(9)], images=image_bytes(1))
    sizes = [path.stat().st_size for path in sorted((out / "annotations").iterdir())]
    monkeypatch.setattr(compaction_plan, "MIB", 1)
    new = compacted(out, tmp_path / "new", target_mib=int(3.5 * max(sizes)))
    shards = [
        pq.read_table(path, columns=["shard"]).column("shard").unique().to_pylist()
        for path in sorted((new / "annotations").iterdir())
    ]
    assert [len(part) for part in shards] == [3, 3, 3]
    assert len({url for part in shards for url in part}) == 9
    assert rows_by_shard(new) == rows_by_shard(out)


def test_a_shard_above_the_target_gets_a_file_of_its_own(out, tmp_path, monkeypatch):
    monkeypatch.setattr(compaction_plan, "MIB", 1)
    new = compacted(out, tmp_path / "new", target_mib=1)
    assert len(list((new / "annotations").iterdir())) == 4
    assert rows_by_shard(new) == rows_by_shard(out)


def test_pages_have_checksums(new):
    path = next((new / "annotations").iterdir())
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x55
    with pytest.raises(OSError, match="CRC checksum"):
        pq.ParquetFile(io.BytesIO(bytes(data)), page_checksum_verification=True).read()


def test_a_compacted_folder_is_compacted_to_another_size(out, new, tmp_path, monkeypatch):
    monkeypatch.setattr(compaction_plan, "MIB", 1000)
    again = compacted(new, tmp_path / "again", target_mib=20)
    assert len(list((again / "annotations").iterdir())) > 1
    assert rows_by_shard(again) == rows_by_shard(out)
    assert read_status(str(again)) == read_status(str(out))


def test_the_old_folder_is_only_read(out, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    compacted(out, tmp_path / "new")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


# random folders

OUTCOMES = st.sampled_from(["rows", "rows", "rows", "none", "errors", "damaged", "failed", "left"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outcomes=st.lists(st.tuples(OUTCOMES, st.integers(1, 9)), min_size=1, max_size=6),
    target_bytes=st.integers(1, 60_000),
    rows_per_group=st.integers(1, 20),
)
def test_any_folder_keeps_the_state_and_rows_of_each_shard(
    outcomes, target_bytes, rows_per_group, tmp_path_factory, monkeypatch
):
    folder = tmp_path_factory.mktemp("random")
    out = made_of(folder, outcomes)
    monkeypatch.setattr(compaction_plan, "MIB", 1)
    monkeypatch.setattr(compaction, "ROWS_PER_GROUP", rows_per_group)
    new = compacted(out, folder / "new", target_mib=target_bytes)
    assert rows_by_shard(new) == rows_by_shard(out)
    one, two = (replace(read_status(str(place)), succeeded=False) for place in (out, new))
    assert one == two
    assert not (new / "_SUCCESS").exists()


def made_of(folder, outcomes):
    """OUT with a shard for each outcome."""
    shards = [[row(index) for index in range(count)] for _, count in outcomes]
    out = write_job(folder, shards, done=0, images=image_bytes(1))
    job = prepare_job(demo_job(sorted(folder.glob("*.tar")), out))
    for shard, rows, (outcome, _) in zip(job.shards, shards, outcomes, strict=True):
        if outcome == "left":
            continue
        if outcome == "failed":
            record_failure(job.folder, shard, 3, "the store is down")
            continue
        with ShardWriter(shard, {**job.metadata, "attempt": shard.shard_id[-6:]}) as writer:
            for index, entry in enumerate(rows):
                writer.add_sample([entry] if outcome in ("rows", "damaged") else [], ())
                if outcome == "errors":
                    writer.add_error(error(index))
            if outcome == "damaged":
                writer.add_error(
                    SampleError("read", "truncated", "the archive ends early", damages_shard=True)
                )
            writer.publish(str(out))
    return out


# interruptions


@pytest.mark.parametrize(
    "published",
    [pytest.param(number, marks=() if number % 4 == 0 else pytest.mark.slow) for number in range(9)],
)
def test_an_interrupted_compaction_is_no_output_of_a_job_and_is_resumed(
    published, out, tmp_path, monkeypatch, legrad
):
    """Killed after so many files: nothing wrong counts as done, and the same command completes it."""
    monkeypatch.setattr(compaction_plan, "MIB", 1)
    new, left = tmp_path / "new", [published]
    publish = storage.publish

    def killed(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        publish(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", killed)
        patch.setattr(compaction, "WRITERS", 1)
        with pytest.raises(KeyboardInterrupt):
            compacted(out, new, target_mib=20_000)
    assert not (new / "_SUCCESS").exists()
    assert not list(new.rglob("*.part"))
    before = {path: path.stat().st_ino for path in new.glob("*/part-*.parquet")}
    if (new / "compaction.json").exists() and not (new / "job.json").exists():
        code, _, shown = legrad("status", new)
        assert code == 1
        assert "unfinished compaction" in shown
    assert legrad("compact", out, new, "--target-mib", 20_000)[0] == 0
    assert {path: path.stat().st_ino for path in before} == before
    assert rows_by_shard(new) == rows_by_shard(out)
    assert read_status(str(new)) == read_status(str(out))


@pytest.mark.slow
@pytest.mark.medium
def test_a_process_that_is_killed_while_it_writes_a_file_leaves_no_part_of_it_to_readers(
    out, tmp_path, legrad
):
    new = tmp_path / "new"
    killed = (
        "import os, sys\n"
        "from tests.helpers.compacted_jobs import compacted\n"
        "calls = []\n"
        "def sync(descriptor):\n"
        "    calls.append(descriptor)\n"
        "    if len(calls) == 3:\n"
        "        os.kill(os.getpid(), 9)\n"
        "os.fsync = sync\n"
        "compacted(*sys.argv[1:])\n"
    )
    ended = subprocess.run([sys.executable, "-c", killed, out, new], cwd=REPOSITORY, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list((new / ".tmp").rglob("*.part"))
    for path in new.rglob("*.parquet"):
        pq.ParquetFile(path).read()
    assert legrad("status", new)[0] == 1
    assert legrad("compact", out, new)[0] == 0
    assert rows_by_shard(new) == rows_by_shard(out)
    assert_all_readers_find(new, ROWS)


def test_a_finished_compaction_is_repeated_without_writing_rows(out, tmp_path, legrad):
    assert legrad("compact", out, tmp_path / "new")[0] == 0
    before = {path: path.stat().st_ino for path in (tmp_path / "new").glob("*/part-*.parquet")}
    assert legrad("compact", out, tmp_path / "new")[0] == 0
    assert {path: path.stat().st_ino for path in before} == before


def test_a_part_that_is_cut_is_written_again(out, tmp_path, legrad):
    new = compacted(out, tmp_path / "new")
    part = next((new / "annotations").iterdir())
    part.write_bytes(part.read_bytes()[:-100])
    assert legrad("status", new)[0] == 3
    assert legrad("compact", out, new)[0] == 0
    assert rows_by_shard(new) == rows_by_shard(out)


def test_a_shard_that_is_annotated_again_in_the_meantime_ends_the_compaction(tmp_path):
    out = complete_job(tmp_path / "job")
    plan = plan_compaction(str(out), 512)
    folder = OutputFolder(str(out))
    for table in ("annotations", "errors"):
        path = Path(folder.files.file_url(table, sorted(folder.ids("annotations"))[0]))
        text = json.loads(pq.ParquetFile(path).metadata.metadata[b"legrad"])
        rows = pq.read_table(path)
        with pq.ParquetWriter(path, rows.schema.remove_metadata()) as writer:
            writer.write_table(rows)
            writer.add_key_value_metadata({"legrad": json.dumps({**text, "attempt": "b"})})
    with pytest.raises(MismatchError, match="changed while it was compacted"):
        write_compaction(plan, str(tmp_path / "new"))
    assert not (tmp_path / "new" / "job.json").exists()


# what is refused


def test_the_output_of_a_job_that_is_not_complete_is_refused_unless_it_is_asked_for(tmp_path, legrad):
    out = good_output(tmp_path)
    code, printed, _ = legrad("compact", out, tmp_path / "new")
    assert code == 3
    assert "1 failed" in printed
    assert "--incomplete" in printed
    assert not (tmp_path / "new").exists()
    code, printed, _ = legrad("compact", out, tmp_path / "new", "--incomplete")
    assert code == 3
    assert rows_by_shard(tmp_path / "new") == rows_by_shard(out)
    assert read_status(str(tmp_path / "new")) == read_status(str(out))


def test_no_job_is_resumed_in_a_compacted_folder(out, tmp_path):
    new = compacted(out, tmp_path / "new")
    shards = sorted(out.parent.glob("*.tar"))
    (tmp_path / "unfinished").mkdir()
    shutil.copy(new / "compaction.json", tmp_path / "unfinished")
    for folder in (new, tmp_path / "unfinished"):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(UserError, match=r"no job can be resumed: set output\.dir") as raised:
            prepare_job(demo_job(shards, folder, run={"error_budget": 0.5}))
        assert "\n" not in str(raised.value)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_neither_folder_may_lie_in_the_other(out, tmp_path, legrad):
    shutil.copytree(out, tmp_path / "a" / "out")
    inner = tmp_path / "a" / "out"
    (tmp_path / "link").symlink_to(inner)
    for new in (
        inner,
        inner / "new",
        inner / "annotations",
        tmp_path / "a",
        tmp_path / "link",
        f"{inner}/../out",
    ):
        code, _, shown = legrad("compact", inner, new)
        assert code == 1
        assert "choose a folder outside" in shown
    assert rows_by_shard(inner) == rows_by_shard(out)


def test_a_folder_that_holds_something_else_is_refused(out, tmp_path, legrad):
    new = tmp_path / "new"
    for make in (
        lambda: (new / "notes.txt").write_text("mine"),
        (new / "annotations").mkdir,
        lambda: (new / "notes").symlink_to(out / "annotations"),
        lambda: (new / "job.json").symlink_to("/nowhere"),
    ):
        new.mkdir()
        make()
        code, _, shown = legrad("compact", out, new)
        assert code == 1
        assert "expected an empty folder" in shown
        shutil.rmtree(new)


def test_another_target_or_another_folder_is_no_continuation(out, new, tmp_path, legrad):
    shutil.copytree(new, tmp_path / "copy")
    code, _, shown = legrad("compact", out, tmp_path / "copy", "--target-mib", 7)
    assert code == 1
    assert "choose another folder" in shown
    other = write_job(tmp_path / "other", [varied_rows(3)])
    assert legrad("compact", other, tmp_path / "copy")[0] == 1
    assert rows_by_shard(tmp_path / "copy") == rows_by_shard(out)


def test_nothing_is_written_through_links_in_an_unfinished_compaction(out, tmp_path, legrad):
    new, elsewhere = compacted(out, tmp_path / "new"), tmp_path / "elsewhere"
    shutil.move(new / "annotations", elsewhere)
    (new / "annotations").symlink_to(elsewhere)
    code, _, shown = legrad("compact", out, new)
    assert code == 1
    assert "annotations is a link" in shown
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".tmp").symlink_to(elsewhere)
    code, _, shown = legrad("compact", out, tmp_path / "other")
    assert code == 1
    assert ".tmp is a link" in shown


def test_a_folder_that_cannot_be_written_is_an_error_of_the_environment(out, tmp_path, legrad):
    (tmp_path / "file").write_text("")
    assert legrad("compact", out, tmp_path / "file" / "new")[0] == 2


def test_a_column_that_this_version_does_not_know_is_not_dropped(tmp_path, legrad):
    out = good_output(tmp_path)
    path = target_of(out, "annotations")
    table, text = pq.read_table(path), pq.ParquetFile(path).metadata.metadata[b"legrad"]
    wider = table.append_column("novelty", table.column("area"))
    with pq.ParquetWriter(path, wider.schema) as writer:
        writer.write_table(wider)
        writer.add_key_value_metadata({"legrad": text})
    code, _, shown = legrad("compact", out, tmp_path / "new", "--incomplete")
    assert code == 1
    assert "column novelty would be lost" in shown


# damaged and hostile folders


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % 12 == 0 else pytest.mark.slow)
        for number, name in enumerate(HOSTILE_OUTPUTS)
    ],
)
def test_a_hostile_folder_is_refused_in_one_line_or_copied_with_what_is_sound(name, tmp_path, legrad):
    hostile = HOSTILE_OUTPUTS[name]
    out, new = good_output(tmp_path), tmp_path / "new"
    path = target_of(out, hostile.place)
    hostile.spoil(path)
    code, printed, shown = legrad("compact", out, new, "--incomplete")
    assert code in (1, 2, 3)
    assert "Traceback" not in printed + shown
    assert all(len(line) < 1000 for line in (printed + shown).splitlines())
    if code == 3:
        assert rows_by_shard(new) == rows_of_sound_shards(out)
        state = read_status(str(new))
        assert not state.succeeded
        assert not state.complete
    else:
        assert path.name in printed + shown
        assert not (new / "job.json").exists()
    secret = Path("/etc/passwd").read_bytes()
    assert not any(secret in copy.read_bytes() for copy in new.rglob("*") if copy.is_file())


def rows_of_sound_shards(out):
    """The rows of shards whose two files belong together, each column that is written."""
    folder = OutputFolder(str(out))
    state = read_state(folder, folder.shard_rows(), folder.job().config_hash)
    sound = {*state.done, *state.damaged}
    return rows_by_shard(out, sound)


def damaged_copy(new, tmp_path, spoil):
    copy = tmp_path / "copy"
    shutil.copytree(new, copy)
    spoil(copy)
    return copy


def other_index(change):
    """Rewrite compacted.parquet with other rows or another footer."""

    def spoil(copy):
        path = copy / "compacted.parquet"
        rows, text = pq.read_table(path).to_pylist(), pq.ParquetFile(path).metadata.metadata[b"legrad"]
        schema = pq.read_schema(path).remove_metadata()
        rows, record = change(rows, json.loads(text))
        with pq.ParquetWriter(path, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            writer.add_key_value_metadata({"legrad": json.dumps(record)})

    return spoil


def with_row(**changes):
    return other_index(lambda rows, record: ([{**rows[0], **changes}, *rows[1:]], record))


SPOILT_COPIES = {
    "the index is cut": lambda copy: os.truncate(copy / "compacted.parquet", 300),
    "the index is a pipe": lambda copy: (
        (copy / "compacted.parquet").unlink(),
        os.mkfifo(copy / "compacted.parquet"),
    ),
    "the index lists a shard twice": other_index(lambda rows, record: ([rows[0], *rows], record)),
    "the index lists more rows": with_row(rows=31),
    "the index lists rows beyond the end": with_row(annotations_first_row=10**9),
    "the index lists negative rows": with_row(rows=-30),
    "the index names a part that is not there": with_row(annotations_part=5),
    "the index is of another compaction": other_index(lambda rows, record: (rows, {**record, "plan": "x"})),
    "the index is of another layout": other_index(lambda rows, record: (rows, {**record, "layout": 1})),
    "a footer is no JSON": with_row(footer="{"),
    "a footer counts other rows": with_row(footer="{}"),
    "a part is missing": lambda copy: next((copy / "annotations").iterdir()).unlink(),
    "a part is cut": lambda copy: os.truncate(next((copy / "annotations").iterdir()), 2000),
    "the errors are missing": lambda copy: next((copy / "errors").iterdir()).unlink(),
    "another file is in annotations": lambda copy: shutil.copy(
        next((copy / "annotations").iterdir()), copy / "annotations" / "part-00009.parquet"
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % 4 == 0 else pytest.mark.slow)
        for number, name in enumerate(SPOILT_COPIES)
    ],
)
def test_a_damaged_compacted_folder_never_counts_as_complete(name, new, tmp_path, legrad):
    copy = damaged_copy(new, tmp_path, SPOILT_COPIES[name])
    code, printed, shown = legrad("status", copy)
    assert code in (1, 2, 3)
    assert "Traceback" not in printed + shown
    assert printed.startswith("incomplete") or shown.startswith("legrad: ")
    for words in (["report", copy], ["export", copy, tmp_path / "dest", "--format", "coco"]):
        code, printed, shown = legrad(*words)
        assert "Traceback" not in printed + shown


def test_rows_of_a_part_that_the_index_does_not_describe_are_not_read(new, tmp_path):
    copy = damaged_copy(new, tmp_path, SPOILT_COPIES["the index is of another compaction"])
    folder = OutputFolder(str(copy))
    shard_id = min(folder.ids("annotations"))
    with pytest.raises(DamagedFileError, match="is not the part 0"), folder.open("annotations", shard_id):
        pass


def test_what_was_written_is_read_back_before_the_folder_counts_as_complete(out, tmp_path, monkeypatch):
    """A store that loses a file after it was published."""
    publish = OutputFolder.publish

    def forgetful(self, name, content, subfolder=""):
        publish(self, name, content, subfolder)
        if name == "compacted.parquet":
            (tmp_path / "new" / "annotations" / "part-00000.parquet").unlink()

    monkeypatch.setattr(OutputFolder, "publish", forgetful)
    with pytest.raises(OutputError, match="differs from"):
        compacted(out, tmp_path / "new")
    assert not (tmp_path / "new" / "_SUCCESS").exists()


def test_rows_of_another_shard_are_refused(tmp_path):
    new = compacted(complete_job(tmp_path), tmp_path / "new")
    table = pq.read_table(new / "compacted.parquet")
    rows = table.to_pylist()
    by_count = {row["rows"]: row for row in rows}
    spoiled = by_count[12]
    spoiled["annotations_first_row"] = by_count[30]["annotations_first_row"]
    metadata = pq.read_metadata(new / "compacted.parquet").metadata
    spoilt = pa.Table.from_pylist(rows, table.schema.with_metadata(metadata))
    pq.write_table(spoilt, new / "compacted.parquet")
    folder = OutputFolder(str(new))
    with folder.open("annotations", spoiled["shard_id"]) as file:
        for read in (file.rows, file.tables, lambda columns: [file.read_group(0, columns)]):
            with pytest.raises(DamagedFileError, match=r"has rows of .* where those of .* should be"):
                list(read(["key"]))

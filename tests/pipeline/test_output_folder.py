"""The output folder is the truth for every reader: what a pattern finds is what the job says is there."""

import json
import os
import re
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedFileError, UserError
from pipeline.output.folder import OutputFolder, new_run_id
from pipeline.output.status import read_status
from pipeline.output.tables import open_table
from pipeline.output.writer import ShardWriter
from pipeline.report.totals import read_totals
from pipeline.run.job import prepare_job
from pipeline.run.outcome import JobResult, concluded, first_state
from pipeline.shards.sample_error import SampleError
from pipeline.storage import DigestingStream, open_shard
from tests.helpers.corpus import demo_job, write_corpus, write_word_shards
from tests.helpers.output_readers import assert_all_readers_find

ROWS = 3


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def tars(tmp_path):
    return write_word_shards(tmp_path / "in", ["a", "b", "c", "d"], 3)


def annotate(job, shards=None, *, damaged=(), failures=0):
    """Publish what a worker would: ROWS rows a shard; returns how the run ended."""
    state = first_state(job)
    found = []
    for shard in job.todo if shards is None else shards:
        with ShardWriter(shard, {**job.metadata, "attempt": new_run_id()}) as writer:
            for index in range(ROWS):
                row = {"key": f"k{index}", "sample_index": index, "prompt_index": 0, "prompt": "p"}
                writer.add_sample([{**row, "status": "ok"}], [])
            for index in range(ROWS, ROWS + failures):
                writer.add_sample([], [SampleError("decode", "cut", "it ends early", f"k{index}", index)])
            if shard.canonical_url.rsplit("/")[-1] in damaged:
                writer.add_error(SampleError("read", "truncated", "it ends early", damages_shard=True))
                found.append((shard.canonical_url, "read/truncated"))
            writer.publish(job.config.output.dir, digest_of(shard))
    left = len(job.todo) - (len(job.todo) if shards is None else len(shards))
    done = len(job.todo) - left - len(found)
    state = state.__class__(
        **{**vars(state), "shards_done": done, "shards_damaged": state.shards_damaged + len(found)}
    )
    return concluded(job, JobResult(state, damaged=tuple(found)))


def digest_of(shard):
    with open_shard(shard) as stream:
        digested = DigestingStream(stream)
        while digested.read(1 << 20):
            pass
    return digested.digest()


def names(paths):
    return [path.rsplit("/")[-1] for path in paths]


def todo(job):
    return names(shard.canonical_url for shard in job.todo)


def test_every_reader_counts_the_same_rows_after_a_whole_run(tars, out):
    assert annotate(prepare_job(demo_job(tars, out))).complete
    assert_all_readers_find(out, 4 * ROWS)
    assert (out / "_SUCCESS").exists()


def test_a_half_written_file_of_a_killed_worker_is_seen_by_no_reader(tars, out):
    job = prepare_job(demo_job(tars, out))
    annotate(job, job.todo[:2])
    whole = next((out / "annotations").glob("*.parquet")).read_bytes()
    staging = out / ".tmp" / job.folder.run_id
    for name, content in {
        "1-annotations-x.parquet.part": whole,
        "2-errors-x.parquet.part": whole[:99],
    }.items():
        (staging / name).write_bytes(content)
    assert_all_readers_find(out, 2 * ROWS)
    job.folder.close()
    assert not staging.exists()


def test_shards_taken_out_of_the_list_take_their_rows_with_them_and_nothing_is_deleted(tars, out):
    annotate(prepare_job(demo_job(tars, out)))
    fewer = prepare_job(demo_job(tars[:3], out))
    assert_all_readers_find(out, 3 * ROWS)
    assert any("1 shard(s) are no longer listed" in warning for warning in fewer.warnings)
    assert annotate(fewer).complete
    assert json.loads((out / "_SUCCESS").read_text())["shards"] == 3
    assert_all_readers_find(out, 3 * ROWS)
    moved = sorted(path.name for path in (out / "unlisted").iterdir())
    assert len(moved) == 2
    assert all(name.startswith("d-") and name.endswith(".parquet.moved") for name in moved)


def test_a_shard_that_comes_back_into_the_list_is_annotated_again(tars, out):
    annotate(prepare_job(demo_job(tars, out)))
    annotate(prepare_job(demo_job(tars[:3], out)))
    grown = prepare_job(demo_job(tars, out))
    assert todo(grown) == ["d.tar"]
    assert not (out / "_SUCCESS").exists()
    assert annotate(grown).complete
    assert_all_readers_find(out, 4 * ROWS)


@pytest.mark.parametrize("change", ["size", "mtime"])
def test_a_shard_replaced_under_its_name_is_annotated_again_and_said(tars, out, change):
    annotate(prepare_job(demo_job(tars, out)))
    if change == "size":
        before = tars[1].stat()
        tars[1].write_bytes(tars[1].read_bytes() + bytes(10240))
        os.utime(tars[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(tars[1], (1, 1))
    job = prepare_job(demo_job(tars, out))
    assert todo(job) == ["b.tar"]
    assert any("changed since they were annotated" in line and "b.tar" in line for line in job.warnings)
    assert_all_readers_find(out, 3 * ROWS)
    assert annotate(job).complete
    assert_all_readers_find(out, 4 * ROWS)
    assert prepare_job(demo_job(tars, out)).todo == []


def test_what_an_older_version_of_a_shard_left_does_not_count_for_a_worker_that_dies_while_it_redoes_it(
    tars, out
):
    config = demo_job(tars, out)
    job = prepare_job(config)
    annotate(job)
    kept = {path.name: path.read_bytes() for path in (out / "annotations").glob("b-*")}
    kept_errors = {path.name: path.read_bytes() for path in (out / "errors").glob("b-*")}
    os.utime(tars[1], (1, 1))
    again = prepare_job(config)
    # as if a worker of the first run came late
    for folder, files in {"annotations": kept, "errors": kept_errors}.items():
        for name, content in files.items():
            (out / folder / name).write_bytes(content)
    assert [shard_id for shard_id, _ in read_status(str(out)).mismatched] == [again.todo[0].shard_id]
    late = concluded(again, JobResult(first_state(again).__class__(4, 3, shards_done=1)))
    assert "different attempts, configurations or inputs" in late.stopped
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("how", ["renamed folder", "named by the user"])
def test_a_corpus_that_only_moved_is_not_annotated_again(tars, out, tmp_path, how):
    annotate(prepare_job(demo_job(tars, out)))
    (tmp_path / "elsewhere").mkdir()
    moved = [tmp_path / "elsewhere" / tar.name for tar in tars]
    for source, target in zip(tars, moved, strict=True):
        shutil.copy(source, target)
        source.unlink()
    moves = [f"{tmp_path / 'in'}={tmp_path / 'elsewhere'}"] if how == "named by the user" else []
    job = prepare_job(demo_job(moved, out), moves)
    assert job.todo == []
    assert any("4 shard(s) moved and are not annotated again" in warning for warning in job.warnings)
    assert annotate(job).complete
    assert_all_readers_find(out, 4 * ROWS)
    again = prepare_job(demo_job(moved, out))
    assert (again.todo, again.warnings) == ([], ())
    assert annotate(again).complete
    os.utime(moved[2], (1, 1))
    assert todo(prepare_job(demo_job(moved, out))) == ["c.tar"]


def test_another_corpus_of_the_same_names_and_sizes_is_no_corpus_that_moved(tars, out, tmp_path):
    annotate(prepare_job(demo_job(tars, out)))
    other = write_word_shards(tmp_path / "other", ["a", "b", "c", "d"], 3)
    for tar in other:
        content = tar.read_bytes()
        tar.write_bytes(content.replace(b"a dog", b"a cat"))
    assert [tar.stat().st_size for tar in other] == [tar.stat().st_size for tar in tars]
    job = prepare_job(demo_job(other, out))
    assert len(job.todo) == 4
    assert list((out / "annotations").iterdir()) == []
    assert annotate(job).complete
    assert_all_readers_find(out, 4 * ROWS)


def test_a_new_shard_at_the_place_that_another_one_moved_from_has_files_of_its_own(tars, out, tmp_path):
    annotate(prepare_job(demo_job(tars, out)))
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "in", elsewhere)
    moved = [elsewhere / tar.name for tar in tars]
    annotate(prepare_job(demo_job(moved, out)))
    new = write_corpus(tmp_path / "in", 1, 1)[0].rename(tmp_path / "in" / "a.tar")
    job = prepare_job(demo_job([*moved, new], out))
    assert [shard.canonical_url for shard in job.todo] == [new.as_uri()]
    assert len({shard.shard_id for shard in job.shards}) == 5
    assert annotate(job).complete
    assert_all_readers_find(out, 5 * ROWS)


def test_what_is_reported_of_one_folder_does_not_hide_that_another_one_moved(out, tmp_path):
    folders = [tmp_path / "x", tmp_path / "y"]
    tars = [*write_word_shards(folders[0], ["a"], 3), *write_word_shards(folders[1], ["b"], 3)]
    annotate(prepare_job(demo_job(tars, out)))
    moved = [tmp_path / "u" / "a.tar", tmp_path / "v" / "b.tar"]
    for source, target in zip(folders, moved, strict=True):
        source.rename(target.parent)
    job = prepare_job(demo_job(moved, out), [f"{folders[0]}={moved[0].parent}"])
    assert job.todo == []
    assert_all_readers_find(out, 2 * ROWS)


def test_a_move_that_names_no_shard_of_the_job_is_refused(tars, out, tmp_path):
    annotate(prepare_job(demo_job(tars, out)))
    with pytest.raises(UserError, match="expected as OLD of OLD=NEW"):
        prepare_job(demo_job(tars, out), [f"{tmp_path / 'nowhere'}={tmp_path / 'in'}"])


@pytest.mark.parametrize("other_configuration", [False, True])
def test_a_lost_job_file_beside_annotations_is_refused_and_nothing_is_touched(tars, out, other_configuration):
    job = prepare_job(demo_job(tars, out))
    annotate(job)
    (out / "job.json").unlink()
    before = sorted(out.rglob("*"))
    masks = {"rule": "fixed", "value": 0.3} if other_configuration else {}
    for mismatch in ("refuse", "overwrite"):
        with pytest.raises(UserError, match=rf"{job.stamp.config_hash}.*no job\.json"):
            prepare_job(demo_job(tars, out, masks=masks, output={"on_mismatch": mismatch}))
    assert sorted(out.rglob("*")) == before


def test_a_lost_list_of_shards_is_found_again_in_the_footers(tars, out):
    annotate(prepare_job(demo_job(tars, out)))
    (out / "shards.parquet").unlink()
    os.utime(tars[0], (1, 1))
    assert todo(prepare_job(demo_job(tars, out))) == ["a.tar"]


def overwriting(tars, out):
    return demo_job(tars, out, masks={"rule": "fixed", "value": 0.3}, output={"on_mismatch": "overwrite"})


def test_overwriting_deletes_what_this_program_wrote_and_leaves_the_users_own_files(tars, out):
    (out / "annotations").mkdir(parents=True)
    (out / "errors").mkdir()
    own = [out / "annotations" / "instances_val2017.json", out / "errors" / "notes.txt"]
    for path in own:
        path.write_text("mine")
    annotate(prepare_job(demo_job(tars, out)))
    prepare_job(overwriting(tars, out))
    assert list((out / "annotations").glob("*.parquet")) == []
    assert [path.read_text() for path in own] == ["mine", "mine"]


@pytest.mark.parametrize("linked", ["folder", "file"])
def test_nothing_is_deleted_through_a_link(tars, out, tmp_path, linked):
    annotate(prepare_job(demo_job(tars, out)))
    real = tmp_path / "real"
    if linked == "folder":
        (out / "annotations").rename(real)
        (out / "annotations").symlink_to(real)
        kept = list(real.iterdir())
    else:
        file = next((out / "annotations").iterdir())
        file.rename(real)
        file.symlink_to(real)
        kept = [real]
    with pytest.raises(UserError, match="symbolic link"):
        prepare_job(overwriting(tars, out))
    assert all(path.exists() for path in kept)


def test_a_foreign_parquet_file_among_the_annotations_is_refused_by_name(tars, out):
    annotate(prepare_job(demo_job(tars, out)))
    pq.write_table(pa.table({"x": [1]}), out / "annotations" / "mine.parquet")
    for config in (demo_job(tars, out), overwriting(tars, out)):
        with pytest.raises(UserError, match=r"mine\.parquet"):
            prepare_job(config)
    assert (out / "annotations" / "mine.parquet").exists()


def test_a_folder_of_an_earlier_layout_is_refused_in_one_line(tars, out):
    annotate(prepare_job(demo_job(tars, out)))
    path = out / "job.json"
    document = json.loads(path.read_text())
    del document["layout"]
    path.write_text(json.dumps(document))
    for look in (lambda: prepare_job(demo_job(tars, out)), lambda: read_status(str(out))):
        with pytest.raises(UserError, match=r"another version of this program.*choose another output\.dir"):
            look()


def test_a_damaged_shard_keeps_its_rows_and_the_job_is_not_complete(tars, out):
    result = annotate(prepare_job(demo_job(tars, out)), damaged={"b.tar"})
    assert not result.complete
    assert not (out / "_SUCCESS").exists()
    assert_all_readers_find(out, 4 * ROWS)
    status = read_status(str(out))
    assert names(url for url, _ in status.damaged) == ["b.tar"]
    assert "read/truncated: it ends early" in status.damaged[0][1]
    assert not status.complete
    again = prepare_job(demo_job(tars, out))
    assert again.todo == []
    rerun = annotate(again)
    assert not rerun.complete
    assert names(url for url, _ in rerun.damaged) == ["b.tar"]


def test_damaged_shards_may_be_accepted(tars, out):
    result = annotate(prepare_job(demo_job(tars, out, run={"accept_damaged": True})), damaged={"b.tar"})
    assert result.complete
    assert read_status(str(out)).complete
    assert json.loads((out / "_SUCCESS").read_text())["damaged"] == 1
    assert not annotate(prepare_job(demo_job(tars, out))).complete
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("how", ["its input has changed", "it is asked for"])
def test_a_damaged_shard_is_read_again_when(tars, out, how):
    annotate(prepare_job(demo_job(tars, out)), damaged={"b.tar"})
    if how == "its input has changed":
        os.utime(tars[1], (1, 1))
    job = prepare_job(demo_job(tars, out, run={"retry_damaged": how == "it is asked for"}))
    assert todo(job) == ["b.tar"]
    assert_all_readers_find(out, 3 * ROWS)
    assert annotate(job).complete
    assert read_status(str(out)).complete
    assert list((out / "damaged").iterdir()) == []


def test_a_damaged_shard_whose_record_was_lost_is_not_taken_for_done(tars, out):
    annotate(prepare_job(demo_job(tars, out)), damaged={"b.tar"})
    for record in (out / "damaged").iterdir():
        record.unlink()
    job = prepare_job(demo_job(tars, out))
    assert not annotate(job).complete
    assert not (out / "_SUCCESS").exists()
    assert todo(prepare_job(demo_job(tars, out))) == ["b.tar"]


@pytest.mark.parametrize("samples_per_shard", [3, 300])
def test_too_many_failed_samples_are_no_success_whatever_the_size_and_a_rerun_says_the_same(
    tars, out, samples_per_shard
):
    config = demo_job(tars, out)
    first = annotate(prepare_job(config), failures=samples_per_shard)
    second = annotate(prepare_job(config))
    failed, total = 4 * samples_per_shard, 4 * (samples_per_shard + ROWS)
    for result in (first, second):
        assert not result.complete
        assert f"{failed} of {total} samples failed; run.error_budget is 0.2" in result.stopped
        assert "decode/cut" in result.stopped
        assert "for example k3" in result.stopped
    assert not (out / "_SUCCESS").exists()
    assert not read_status(str(out)).complete
    assert annotate(prepare_job(demo_job(tars, out, run={"error_budget": 1.0}))).complete
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize("settled", ["left", "done", "damaged", "failed"])
def test_a_success_that_does_not_hold_any_more_is_taken_back(tars, out, settled):
    annotate(prepare_job(demo_job(tars, out)))
    assert (out / "_SUCCESS").exists()
    if settled == "left":
        next((out / "annotations").glob("b-*")).unlink()
    elif settled == "damaged":
        tars[1].write_bytes(b"")
    elif settled == "failed":
        next((out / "errors").glob("b-*")).unlink()
    job = prepare_job(demo_job(tars, out))
    result = annotate(job, job.todo[:0])
    assert (out / "_SUCCESS").exists() is (settled == "done")
    assert result.complete is (settled == "done")


def rewritten(path, rows):
    """The file with its first rows alone; its footer stays as it was."""
    table, footer = pq.read_table(path), pq.read_metadata(path).metadata[b"legrad"]
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.slice(0, rows))
        writer.add_key_value_metadata({b"legrad": footer})


def borrowed(out, shard, other):
    """Both files of one shard under the name of another."""
    for folder in ("annotations", "errors"):
        shutil.copy(next((out / folder).glob(f"{other}-*")), next((out / folder).glob(f"{shard}-*")))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(
            lambda out: rewritten(next((out / "annotations").glob("b-*")), 1), id="rows that are not there"
        ),
        pytest.param(lambda out: borrowed(out, "b", "a"), id="the rows of another shard"),
    ],
)
def test_a_file_is_not_done_that_holds(tars, out, spoil):
    for tar in tars:
        os.utime(tar, (5, 5))
    annotate(prepare_job(demo_job(tars, out)))
    spoil(out)
    status = read_status(str(out))
    assert [shard_id[0] for shard_id, _ in status.mismatched] == ["b"]
    assert not status.complete
    assert not annotate(prepare_job(demo_job(tars, out))).complete
    assert not (out / "_SUCCESS").exists()
    again = prepare_job(demo_job(tars, out))
    assert todo(again) == ["b.tar"]
    assert annotate(again).complete
    assert_all_readers_find(out, 4 * ROWS)


def test_bytes_that_change_in_a_published_file_are_damage_to_all_who_read_its_rows(tars, out):
    annotate(prepare_job(demo_job(tars, out)))
    path = next((out / "annotations").glob("b-*"))
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    end = column.data_page_offset + column.total_compressed_size
    content[end - 4 : end] = bytes(byte ^ 1 for byte in content[end - 4 : end])
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=path.name), open_table(str(path), "annotations") as table:
        list(table.rows(["key"]))


def test_a_job_whose_shards_hold_no_sample_is_not_complete(tmp_path, out):
    empty = tmp_path / "empty.tar"
    empty.write_bytes(bytes(10240))
    job = prepare_job(demo_job([empty], out))
    (shard,) = job.todo
    with ShardWriter(shard, {**job.metadata, "attempt": new_run_id()}) as writer:
        writer.publish(job.config.output.dir, digest_of(shard))
    result = concluded(job, JobResult(replace(first_state(job), shards_done=1)))
    assert not result.complete
    assert result.stopped == "no sample could be read (the shards are empty)"
    status = read_status(str(out))
    assert (status.complete, status.shortfall) == (False, result.stopped)
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("stray", ["mine.parquet", "before/mine.parquet", "MINE.PARQUET", "mine.parquet.bak"])
def test_a_file_of_no_listed_shard_is_reported_by_status_and_report(tars, out, stray):
    annotate(prepare_job(demo_job(tars, out)))
    path = out / "annotations" / stray
    path.parent.mkdir(exist_ok=True)
    shutil.copy(next((out / "annotations").glob("b-*")), path)
    assert ds.dataset(out / "annotations").count_rows() > 4 * ROWS
    folder = OutputFolder(str(out))
    status, totals = read_status(str(out)), read_totals(folder, folder.job())
    for complete, shortfall in (
        (status.complete, status.shortfall),
        (totals.complete, totals.shortfall),
    ):
        assert not complete
        assert f"1 file(s) in annotations/ belong to no listed shard, such as {stray}" in shortfall


@pytest.mark.parametrize("stray", ["before/mine.parquet", "MINE.PARQUET", "mine.parquet.bak"])
def test_a_file_that_readers_would_take_for_annotations_is_refused(tars, out, stray):
    annotate(prepare_job(demo_job(tars, out)))
    path = out / "annotations" / stray
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=rf"did not write.*{re.escape(stray)}"):
        prepare_job(demo_job(tars, out))


@pytest.mark.parametrize("hidden", ["_metadata", ".DS_Store"])
def test_a_file_that_readers_pass_over_is_let_alone(tars, out, hidden):
    annotate(prepare_job(demo_job(tars, out)))
    (out / "annotations" / hidden).write_text("mine")
    assert read_status(str(out)).complete
    assert not todo(prepare_job(demo_job(tars, out)))


@pytest.mark.parametrize("what", ["list of shards", "configuration"])
def test_a_job_whose_folder_another_job_took_over_meanwhile_is_not_complete(tars, out, what):
    job = prepare_job(demo_job(tars, out))
    annotate(job, job.todo[:2])
    if what == "list of shards":
        prepare_job(demo_job(tars[:1], out))
    else:
        # two that start at once each find the folder empty
        other = prepare_job(
            demo_job(tars, tmp := out.with_name("other"), masks={"rule": "fixed", "value": 0.3})
        )
        shutil.copy(tmp / "job.json", out / "job.json")
        assert other.stamp.config_hash != job.stamp.config_hash
    result = annotate(job, job.todo)
    assert not result.complete
    assert f"with another {what}" in result.stopped
    assert not (out / "_SUCCESS").exists()
    assert not read_status(str(out)).complete


def test_what_another_job_adds_meanwhile_to_a_shorter_list_is_no_success(tars, out):
    whole = prepare_job(demo_job(tars, out))
    shorter = prepare_job(demo_job(tars[:1], out))
    annotate(whole, whole.todo[2:3])
    result = annotate(shorter)
    assert not result.complete
    assert "1 file(s) that belong to no shard of this job" in result.stopped
    again = prepare_job(demo_job(tars[:1], out))
    assert_all_readers_find(out, ROWS)
    assert annotate(again).complete


@pytest.mark.parametrize("changed", range(0, 12, 3))
def test_a_shard_of_another_content_among_many_that_moved_with_their_times_is_done_again(
    out, tmp_path, changed
):
    tars = write_word_shards(tmp_path / "in", [f"{number:02}" for number in range(12)], 3)
    annotate(prepare_job(demo_job(tars, out)))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    moved = [tmp_path / "elsewhere" / tar.name for tar in tars]
    moved[changed].write_bytes(moved[changed].read_bytes().replace(b"a dog", b"a cat"))
    # touched, with the content that it had
    os.utime(moved[changed - 1], (1, 1))
    job = prepare_job(demo_job(moved, out))
    assert todo(job) == [moved[changed].name]
    assert annotate(job).complete
    assert_all_readers_find(out, 12 * ROWS)


def test_a_corpus_that_moves_twice_and_then_back_is_done_all_the_way(tars, out, tmp_path):
    annotate(prepare_job(demo_job(tars, out)))
    place = tmp_path / "in"
    for folder in (tmp_path / "first", tmp_path / "second", tmp_path / "in"):
        shutil.copytree(place, folder, copy_function=shutil.copyfile)
        shutil.rmtree(place)
        place = folder
        job = prepare_job(demo_job(sorted(place.iterdir()), out))
        assert job.todo == []
        assert annotate(job).complete
        assert_all_readers_find(out, 4 * ROWS)
    assert {row["moved_from"] for row in job.rows} == {tar.as_uri() for tar in tars}
    os.utime(tars[0], (1, 1))
    assert annotate(prepare_job(demo_job(tars, out))).complete
    assert prepare_job(demo_job(tars, out)).rows[0]["moved_from"] is None

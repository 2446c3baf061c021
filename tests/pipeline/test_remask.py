"""Masks made from stored maps are those of a direct run, and what cannot be made so is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import legrad
from pipeline import storage
from pipeline.annotate.model import load_explainer
from pipeline.annotate.stored_maps import parts_from_maps
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import DEMO_MODEL_NAME, demo_shard_paths
from pipeline.errors import ShardError, UserError
from pipeline.output.folder import OutputFolder
from pipeline.output.status import read_status
from pipeline.run.remask import prepare_remask
from pipeline.shards.samples import read_samples
from tests.helpers.compacted_jobs import compacted
from tests.helpers.corpus import captions_json, sample, write_shard
from tests.helpers.object_servers import FolderHandler, serving
from tests.helpers.remasking import (
    annotated,
    assert_same_masks,
    counts_of,
    iou,
    remasked,
    rows_in,
    scenes_job,
)

SCENES = 5


@pytest.fixture(scope="module")
def explainer():
    return load_explainer(ModelConfig(name=DEMO_MODEL_NAME, pretrained="demo", precision="fp32"), "cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A shard of some scenes, one with equal captions, one without captions, one damaged."""
    folder = tmp_path_factory.mktemp("corpus")
    with Path(demo_shard_paths("heldout")[0]).open("rb") as tar:
        scenes = [
            found
            for _, found in zip(range(SCENES), read_samples(tar, max_member_bytes=1 << 24), strict=False)
        ]
    samples = [
        sample(f"scene{scene.index}", jpg=scene.fields["jpg"], json=scene.fields["json"], txt=None)
        for scene in scenes
    ]
    picture, captions = scenes[0].fields["jpg"], json.loads(scenes[0].fields["json"])["captions"]
    repeated = captions_json([captions[0], "", captions[1], captions[0]])
    samples += [
        sample("repeated", jpg=picture, json=repeated, txt=None),
        sample("empty", jpg=picture, json=captions_json([]), txt=None),
        sample("broken", jpg=picture[:200], json=captions_json(captions), txt=None),
    ]
    return write_shard(folder / "scenes.tar", samples)


@pytest.fixture(scope="module")
def stored(corpus, explainer, tmp_path_factory):
    """OUT of these scenes, with all rows and the default kind of masks."""
    return annotated(explainer, scenes_job([corpus], tmp_path_factory.mktemp("stored") / "out"))


VARIANTS = {
    "another value": {"value": 0.55},
    "otsu alone": {"rule": "otsu", "combine": "independent"},
    "quantile": {"rule": "quantile", "quantile": 0.9, "combine": "independent"},
    "band on the scale of otsu": {"rule": "band", "band_center": "otsu", "combine": "independent"},
    "band in competition": {"rule": "band"},
    "backgrounds compete": {"contrast": 0},
    "contrast with backgrounds alone": {"contrast": 0.8, "contrast_with": "background"},
    "not smoothed, cleaned": {"smooth": 0, "min_component": 0.01, "max_hole": 0.01},
    "filters": {"min_similarity": 0.1, "min_lead": 0.0, "min_area": 0.05, "min_peak": 1e-5},
    "instances": {"instances": "watershed", "combine": "independent"},
    "a small frame": {"max_side": 50},
    "par": {"refine": "par", "combine": "independent"},
    "pamr in competition": {"refine": "pamr", "refine_sharpness": 0.2},
}


def as_overrides(masks):
    return [f"masks.{key}={json.dumps(value)}" for key, value in masks.items()]


@pytest.mark.parametrize("masks", VARIANTS.values(), ids=VARIANTS.keys())
def test_masks_from_stored_maps_are_those_of_a_direct_run(masks, stored, corpus, explainer, tmp_path):
    config = scenes_job([corpus], tmp_path / "direct", masks=masks)
    direct = annotated(explainer, config)
    found = remasked(stored, tmp_path / "new", *as_overrides(masks))
    assert_same_masks(rows_in(found), rows_in(direct))
    assert counts_of(found) == counts_of(direct)
    for name in ("annotations", "errors"):
        (one,), (two,) = (list((Path(out) / name).glob("*.parquet")) for out in (found, direct))
        assert one.name == two.name
        assert pq.read_schema(one).names == pq.read_schema(two).names


@pytest.mark.parametrize(
    "masks", [{"contrast": 0.7}, {"rule": "otsu", "contrast": 0, "combine": "argmax"}], ids=str
)
def test_a_neutral_text_and_classes_with_dropped_rows_give_the_same_masks(masks, corpus, explainer, tmp_path):
    sections = {
        "prompts": {
            "source": "classes",
            "classes": ["dog", "chair", "car", "guitar", "cat"],
            "background": ["sky", "a wall", "grass"],
            "neutral": "a photo of a",
            "neutral_threshold": 0.6,
            "max_background": 2,
            "max_per_sample": 3,
        },
    }
    early = {"min_similarity": 0.05, "combine": "independent", "contrast": 0}
    later = {**early, "min_similarity": 0.12, **masks}
    stored = annotated(explainer, scenes_job([corpus], tmp_path / "out", masks=early, **sections))
    direct = annotated(explainer, scenes_job([corpus], tmp_path / "direct", masks=later, **sections))
    found = remasked(stored, tmp_path / "new", *as_overrides(later))
    assert 0 < len(rows_in(found)) < len(rows_in(stored))
    assert_same_masks(rows_in(found), rows_in(direct))
    assert counts_of(found) == counts_of(direct)


def test_new_masks_can_be_made_from_a_folder_of_new_masks(stored, tmp_path):
    once = remasked(stored, tmp_path / "once", "masks.rule=otsu")
    back = remasked(once, tmp_path / "back", "masks.rule=fixed")
    plain = remasked(stored, tmp_path / "plain")
    assert_same_masks(rows_in(back), rows_in(plain), least_iou=1)
    assert_same_masks(rows_in(back), rows_in(stored))


def test_a_compacted_folder_gives_the_same_masks(stored, tmp_path):
    compact = compacted(stored, tmp_path / "compacted")
    found = remasked(compact, tmp_path / "new", "masks.value=0.5")
    assert_same_masks(rows_in(found), rows_in(remasked(stored, tmp_path / "same", "masks.value=0.5")), 1)


def test_no_model_is_loaded_and_no_image_read_unless_masks_are_refined(stored, corpus, tmp_path, monkeypatch):
    def forbidden(*_arguments, **_options):
        raise AssertionError("a model is loaded")

    for name in ("legrad.loading.load_model", "legrad.loading.model_digest", "open_clip.create_model"):
        monkeypatch.setattr(name, forbidden)
    monkeypatch.setattr(legrad.LeGrad, "__init__", forbidden)
    kept = corpus.rename(tmp_path / "elsewhere.tar")
    try:
        found = remasked(stored, tmp_path / "new", "masks.value=0.5")
        with pytest.raises(ShardError):
            remasked(stored, tmp_path / "refined", "masks.refine=par")
    finally:
        kept.rename(corpus)
    assert rows_in(found).keys() == rows_in(stored).keys()


def test_the_bytes_counted_for_a_sample_include_those_of_its_background_texts(stored, tmp_path):
    class Attempt:
        def counted(self, samples, _stream):
            return samples

    job = prepare_remask(stored, str(tmp_path / "new"))
    parts = parts_from_maps(job.config, job.stamp.maps_hash, torch.device("cpu"), None)
    items = [item for item in parts.read(job.shards[0], Attempt()) if getattr(item, "rows", ())]
    assert len(items) == SCENES + 1
    for item in items:
        (ready,) = parts.work.prepare([item])
        assert ready.backgrounds > len(ready.prompts)
        assert ready.held_bytes < parts.size_bytes(item) < 3 * ready.held_bytes


def test_images_that_moved_are_read_where_they_are_now(stored, corpus, tmp_path):
    moved = shutil.copy(corpus, tmp_path / corpus.name)
    here = remasked(stored, tmp_path / "here", "masks.refine=par")
    there = remasked(stored, tmp_path / "there", "masks.refine=par", shards=[str(moved)])
    assert_same_masks(rows_in(there), rows_in(here), least_iou=1)


def test_a_shard_that_has_changed_is_refused(corpus, explainer, tmp_path):
    shard = Path(shutil.copy(corpus, tmp_path / "scenes.tar"))
    stored = annotated(explainer, scenes_job([shard], tmp_path / "out"))
    write_shard(shard, [sample("other", jpg=b"no image")])
    with pytest.raises(ShardError, match="changed since it was annotated"):
        remasked(stored, tmp_path / "new", "masks.refine=par")
    (tmp_path / "copy").mkdir()
    copy = write_shard(tmp_path / "copy" / "scenes.tar", [sample("other", 7)])
    with pytest.raises(ShardError, match=r"sample number 0 is other; expected scene0"):
        remasked(stored, tmp_path / "copied", "masks.refine=par", shards=[str(copy)])


def test_a_shard_that_has_changed_on_a_web_server_is_refused_before_anything_is_started(corpus, tmp_path):
    from pipeline.run.job import prepare_job

    (tmp_path / "served").mkdir()
    shard = Path(shutil.copy(corpus, tmp_path / "served" / "scenes.tar"))
    with serving(partial(FolderHandler, directory=str(tmp_path / "served"))) as port:
        url = f"http://127.0.0.1:{port}/scenes.tar"
        out = prepare_job(scenes_job([url], tmp_path / "out")).folder.url
        refined = ["masks.refine=par"]
        prepare_remask(out, str(tmp_path / "same"), refined, [url])
        shard.write_bytes(shard.read_bytes() + bytes(512))
        with pytest.raises(UserError, match=r"1 shard\(s\) have changed since they were annotated: http"):
            prepare_remask(out, str(tmp_path / "new"), refined, [url])
        prepare_remask(out, str(tmp_path / "unrefined"), ["masks.refine=none"])


def test_a_damaged_shard_stays_damaged_and_a_missing_one_stays_left(corpus, explainer, tmp_path):
    content = corpus.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    later = tmp_path / "later.tar"
    later.write_bytes(content)
    config = scenes_job([tmp_path / "cut.tar", later], tmp_path / "out")
    stored = annotated(explainer, config)
    shard_id = next(name for name in OutputFolder(stored).ids("annotations") if name.startswith("later"))
    for name in ("annotations", "errors"):
        (Path(stored) / name / f"{shard_id}.parquet").unlink()
    found = remasked(stored, tmp_path / "new", "masks.value=0.5")
    status = read_status(found)
    assert (len(status.damaged), len(status.left), status.complete) == (1, 1, False)
    assert status.damaged[0][1] == read_status(stored).damaged[0][1]
    assert status.counts == counts_of(stored)
    annotated(explainer, config)
    remasked(stored, tmp_path / "new", "masks.value=0.5")
    assert len(read_status(found).done) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masks", [{"refine": "par"}, {"combine": "independent"}], ids=str)
def test_a_gpu_makes_the_masks_of_the_cpu(masks, stored, tmp_path):
    here = remasked(stored, tmp_path / "cpu", *as_overrides(masks))
    there = remasked(stored, tmp_path / "gpu", *as_overrides(masks), device="cuda")
    assert_same_masks(rows_in(there), rows_in(here), least_iou=0.98)


REFUSED = {
    "model.name=ViT-B-16": "expected keys of masks, output, run, got 'model.name'",
    "prompts.background=none": "for other prompts or another model, annotate again",
    "output.dir=elsewhere": "is the argument NEW",
    "masks.colour=red": "masks.colour",
    "masks.segmenter=facebook/sam-vit-base": "masks.segmenter needs a model",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_keys_that_need_a_model_are_refused(override, message, stored, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare_remask(stored, str(tmp_path / "new"), [override])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"min_similarity": 0.2}, ["masks.min_similarity=0.1"], "expected at least 0.2, got 0.1"),
        ({"min_peak": 1e-6}, ["masks.min_peak=null"], "expected at least 1e-06, got None"),
        ({"min_similarity": 0.2}, ["output.rows=all"], "rows of prompts that masks.min_similarity rejected"),
        ({"min_area": 0.1}, ["masks.value=0.5"], "masks.min_area was 0.1, and rows of smaller masks"),
        ({"min_lead": 0.1}, ["masks.min_lead=0.2"], "masks.min_lead: expected 0.1 as before, got 0.2"),
        ({"min_lead": 0.1}, ["masks.min_peak=0.2"], "masks.min_peak: expected None as before, got 0.2"),
    ],
    ids=str,
)
def test_filters_that_would_need_rows_that_were_dropped_are_refused(before, now, message, corpus, tmp_path):
    from pipeline.run.job import prepare_job

    config = scenes_job([corpus], tmp_path / "out", masks=before, output={"rows": "accepted"})
    out = prepare_job(config).folder.url
    with pytest.raises(UserError, match=message):
        prepare_remask(out, str(tmp_path / "new"), now)
    # with all rows there, nothing is missing
    kept = prepare_job(
        scenes_job([corpus], tmp_path / "all", masks=before, output={"rows": "all"})
    ).folder.url
    prepare_remask(kept, str(tmp_path / "new"), now)


def test_folders_without_maps_and_folders_of_other_jobs_are_refused(stored, corpus, tmp_path):
    from pipeline.run.job import prepare_job

    bare = prepare_job(scenes_job([corpus], tmp_path / "bare", output={"heatmap": False})).folder.url
    with pytest.raises(UserError, match=r"stores no maps \(output.heatmap is false\)"):
        prepare_remask(bare, str(tmp_path / "new"))
    earlier = Path(prepare_job(scenes_job([corpus], tmp_path / "earlier")).folder.url)
    document = json.loads((earlier / "job.json").read_text())
    del document["model_facts"]
    (earlier / "job.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="with 8 bits a value"):
        prepare_remask(str(earlier), str(tmp_path / "new"))
    with pytest.raises(UserError, match="need a folder of their own"):
        prepare_remask(stored, stored)
    new = remasked(stored, tmp_path / "new", "masks.value=0.5")
    with pytest.raises(UserError, match=r"masks.value: 0.5 before, 0.6 now"):
        prepare_remask(stored, new, ["masks.value=0.6"])
    other = prepare_job(scenes_job([corpus], tmp_path / "other", masks={"smooth": 0.2})).folder.url
    with pytest.raises(UserError, match=r"the stored maps \(input.maps\): made by the configuration"):
        prepare_remask(other, new, ["masks.value=0.5", "masks.smooth=0.6"])
    with pytest.raises(UserError, match=r"input\.maps"):
        prepare_job(scenes_job([corpus], new, masks={"value": 0.5}))
    with pytest.raises(UserError, match="use `legrad remask`"):
        prepare_job(scenes_job([corpus], tmp_path / "x", input={"maps": stored}))


@pytest.mark.parametrize("keep", ["good", "not-bad"])
def test_marks_keep_the_same_prompts_as_in_a_direct_run(tmp_path, corpus, explainer, keep):
    url = storage.list_shards([str(corpus)])[0].canonical_url
    out = annotated(explainer, scenes_job([corpus], tmp_path / "out"))
    marked = [("scene0", 0, "bad"), ("scene1", 1, "good"), ("repeated", 0, "bad"), ("repeated", 2, "good")]
    names = ("shard", "key", "prompt_index", "mark")
    marks = [dict(zip(names, (url, *mark), strict=True)) for mark in marked]
    (tmp_path / "marks.json").write_text(json.dumps(marks))
    settings = {"source": "captions", "background": "default", "marks": marks, "keep_marked": keep}
    direct = annotated(explainer, scenes_job([corpus], tmp_path / "direct", prompts=settings))
    overrides = (f"prompts.marks={tmp_path}/marks.json", f"prompts.keep_marked={keep}")
    new = remasked(out, tmp_path / "new", *overrides)
    found, expected = rows_in(new), rows_in(direct)
    assert 0 < len(found) < len(rows_in(out))
    assert found.keys() == expected.keys()
    for place, row in expected.items():
        # other prompts in a batch change the last bits of similarities and grids
        assert found[place]["similarity"] == pytest.approx(row["similarity"], abs=1e-5)
        assert found[place]["peak"] == pytest.approx(row["peak"], rel=1e-3)
        assert found[place]["status"] == row["status"]
        assert iou(found[place]["mask"], row["mask"]) >= 0.995, place
    assert counts_of(new).annotated == counts_of(direct).annotated


@pytest.mark.parametrize(
    ("before", "masks", "now", "message"),
    [
        ((("bad", 0),), {}, "prompts.marks=null", "keeps prompts that the marks of the job did not keep"),
        ((("bad", 0),), {}, "prompts.keep_marked=good", ""),
        (
            (("good", 0),),
            {},
            "prompts.keep_marked=not-bad",
            "keeps prompts that the marks of the job did not",
        ),
        ((("bad", 0),), {}, "masks.value=0.5", ""),
        ((), {"min_lead": 0.1}, "bad", "which rows masks.min_lead omitted depends on the other prompts"),
        ((), {"min_area": 0.1}, "bad", "which rows masks.min_area omitted depends on the other prompts"),
        ((), {"min_similarity": 0.1}, "bad", ""),
    ],
    ids=str,
)
def test_marks_that_would_need_rows_that_were_dropped_are_refused(
    tmp_path, corpus, before, masks, now, message
):
    from pipeline.run.job import prepare_job

    url = storage.list_shards([str(corpus)])[0].canonical_url
    mark = {"shard": url, "key": "scene0", "prompt_index": 0, "mark": "bad"}
    marks = [{**mark, "mark": name, "prompt_index": index} for name, index in before]
    keep = "good" if ("good", 0) in before else "not-bad"
    prompts = {"marks": marks or None, "keep_marked": keep}
    config = scenes_job([corpus], tmp_path / "out", masks=masks, prompts=prompts, output={"rows": "accepted"})
    out = prepare_job(config).folder.url
    overrides = [f"prompts.marks={json.dumps([mark])}" if now == "bad" else now]
    if not message:
        prepare_remask(out, str(tmp_path / "new"), overrides)
        return
    with pytest.raises(UserError, match=message):
        prepare_remask(out, str(tmp_path / "new"), overrides)


def test_marks_of_other_prompts_or_of_another_corpus_are_refused(tmp_path, corpus, explainer):
    url = storage.list_shards([str(corpus)])[0].canonical_url
    out = annotated(explainer, scenes_job([corpus], tmp_path / "out"))
    mark = {"key": "scene0", "prompt_index": 0, "prompt": "something else", "mark": "bad"}
    (tmp_path / "marks.json").write_text(json.dumps([{**mark, "shard": url}]))
    new = remasked(out, tmp_path / "new", f"prompts.marks={tmp_path}/marks.json")
    assert counts_of(new).errors_by_kind["caption/other_prompt_marked"] == 1
    (tmp_path / "marks.json").write_text(json.dumps([{**mark, "shard": "s3://b/0.tar"}]))
    with pytest.raises(UserError, match="none of the 1 mark"):
        prepare_remask(str(out), str(tmp_path / "other"), (f"prompts.marks={tmp_path}/marks.json",))

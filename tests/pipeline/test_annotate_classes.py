"""Shards annotated by classes: which rows there are, and how much is computed for them."""

import copy
import io
import itertools
import json

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.demo import assets
from pipeline.output.folder import OutputFolder
from pipeline.prompts.sample_prompts import default_background
from pipeline.run import job as jobs
from pipeline.run.estimate import dry_run
from pipeline.shards.samples import RawSample, read_samples
from tests.helpers.corpus import demo_job, image_bytes, sample, write_shard

SAMPLES = 8


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=1)


@pytest.fixture(scope="module")
def scenes():
    """The first scenes that the demo model never saw: key, image and JSON."""
    path = assets.demo_shard_paths("heldout")[0]
    with path.open("rb") as tar:
        items = read_samples(tar, max_member_bytes=1 << 24)
        found = [item for item in items if isinstance(item, RawSample)][:SAMPLES]
    return [(item.key, item.fields["jpg"], json.loads(item.fields["json"])) for item in found]


@pytest.fixture
def annotate(explainer, tmp_path):
    """Annotates one shard and returns its rows and counts."""

    def run(path, explainer=explainer, **sections):
        config = demo_job([path], tmp_path / "out", **sections)
        annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata={"config_hash": "h"})
        report = annotator.annotate(storage.list_shards(config.input.shards)[0])
        annotator.close()
        return pq.read_table(tmp_path / "out" / "annotations").to_pylist(), report.counts

    return run


class Counter:
    """Wraps an explainer and counts images, texts, products and maps."""

    def __init__(self, explainer):
        self.explainer = copy.copy(explainer)
        self.images, self.maps, self.batches, self.texts = 0, 0, 0, []
        tokenizer = copy.copy(explainer.tokenizer)

        def tokenise(texts, **options):
            self.texts += texts
            return explainer.tokenizer(texts, **options)

        def encode(images, **options):
            self.images += len(images)
            self.batches += 1
            return explainer.encode(images, **options)

        def relevance(images, texts, image_index=None, **options):
            grids = explainer.relevance(images, texts, image_index, **options)
            self.maps += grids.shape[:-2].numel()
            return grids

        tokenizer_class = type(
            "Tokenizer", (type(tokenizer),), {"__call__": lambda _, *a, **k: tokenise(*a, **k)}
        )
        tokenizer.__class__ = tokenizer_class
        self.explainer.tokenizer = tokenizer
        self.explainer.encode, self.explainer.relevance = encode, relevance


def write_scenes(path, scenes, **fields):
    return write_shard(
        path,
        [
            sample(
                key,
                jpg=image,
                txt=None,
                json=json.dumps(labels | {k: f(labels) for k, f in fields.items()}).encode(),
            )
            for key, image, labels in scenes
        ],
    )


def test_classes_that_a_caption_mentions_have_the_rows_of_the_scenes_own_classes(annotate, scenes, tmp_path):
    path = write_scenes(tmp_path / "0.tar", scenes)
    rows, counts = annotate(
        path,
        prompts={
            "source": "classes",
            "classes": str(assets.demo_classes_path()),
            "mentioned_in": "json:caption",
        },
    )
    names = assets.demo_classes()
    assert counts.annotated == len(scenes)
    for key, _, labels in scenes:
        mine = [row for row in rows if row["key"] == key]
        assert [row["class_id"] for row in mine] == sorted(labels["class_ids"])
        assert [row["prompt"] for row in mine] == [names[row["class_id"] - 1] for row in mine]
        assert [row["prompt_index"] for row in mine] == [row["class_id"] - 1 for row in mine]


def test_of_all_classes_the_most_similar_have_rows_and_they_are_mostly_the_scenes_own(
    annotate, scenes, explainer, tmp_path
):
    names = assets.demo_classes()
    rows, counts = annotate(
        write_scenes(tmp_path / "0.tar", scenes),
        prompts={"source": "classes", "classes": str(assets.demo_classes_path()), "max_per_sample": 3},
    )
    assert counts.rows == len(rows) == 3 * len(scenes)
    assert counts.dropped_prompts == (len(names) - 3) * len(scenes)
    texts = explainer.embed_text(names)
    found = 0
    for key, image, labels in scenes:
        picture = Image.open(io.BytesIO(image))
        cosines = explainer.similarity(
            explainer.encode(explainer.preprocess([picture], resize="fast")), texts
        )[0]
        mine = [row for row in rows if row["key"] == key]
        chosen = [row["prompt_index"] for row in mine]
        assert chosen == sorted(set(chosen))
        # which of two equally similar ones is chosen, a rounding error may say
        assert cosines[chosen].min() >= cosines.topk(3).values.min() - 1e-5
        for row in mine:
            assert row["similarity"] == pytest.approx(float(cosines[row["prompt_index"]]), abs=1e-4)
        found += len({row["class_id"] for row in mine} & set(labels["class_ids"]))
    assert found > sum(len(labels["class_ids"]) for _, _, labels in scenes) / 2


def test_a_sample_that_mentions_no_class_is_empty_and_its_image_is_not_even_decoded(annotate, tmp_path):
    captions = [b"two dogs", b"a category", b"a hot dog", b"cats and dogs"]
    path = write_shard(
        tmp_path / "0.tar",
        [
            sample(str(index), index, txt=caption, jpg=b"no image" if index == 1 else image_bytes(index))
            for index, caption in enumerate(captions)
        ],
    )
    rows, counts = annotate(
        path, prompts={"source": "classes", "classes": ["cat", "dog", "hot dog"], "mentioned_in": "txt"}
    )
    assert [(row["key"], row["class_id"]) for row in rows] == [("0", 2), ("2", 3), ("3", 1), ("3", 2)]
    assert (counts.samples_in, counts.annotated, counts.empty, counts.failed) == (4, 3, 1, 0)


def test_hundreds_of_classes_cost_one_embedding_each_and_a_few_maps_an_image(annotate, explainer, tmp_path):
    # of words that the demo's text tower knows: others are one to it
    pairs = [" ".join(pair) for pair in itertools.permutations(assets.demo_classes(), 2)]
    names, grounds = pairs[:300], pairs[-50:]
    path = write_shard(tmp_path / "0.tar", [sample(str(index), index) for index in range(6)])
    counter = Counter(explainer)
    rows, counts = annotate(
        path,
        explainer=counter.explainer,
        prompts={
            "source": "classes",
            "classes": names,
            "templates": ["{}", "a {}"],
            "max_per_sample": 2,
            "background": grounds,
            "max_background": 3,
            "neutral": "a photo of a",
        },
        masks={"combine": "argmax"},
        run={"batch_size": 2},
    )
    assert (len(rows), counts.dropped_prompts) == (12, 6 * 298)
    assert (counter.images, counter.batches) == (6, 3)
    assert counter.maps == 6 * (2 + 3 + 1)
    centre = default_background()  # distances between texts are from the mean of these
    assert len(counter.texts) == len(set(counter.texts)) == 2 * (300 + 50 + len(centre)) + 1


def test_templates_give_the_similarities_of_open_clips_zero_shot_classifier(annotate, explainer, tmp_path):
    from open_clip import build_zero_shot_classifier

    names, templates = ["dog", "red car", "cactus"], ["a photo of a {}.", "{}", "a drawing of the {}"]
    rows, _ = annotate(
        write_shard(tmp_path / "0.tar", [sample("a", 1)]),
        prompts={"source": "classes", "classes": names, "templates": templates},
    )
    classifier = build_zero_shot_classifier(explainer.model, explainer.tokenizer, names, templates)
    picture = Image.open(io.BytesIO(image_bytes(1)))
    with torch.no_grad():
        features = explainer.model.encode_image(explainer.preprocess([picture]), normalize=True)
    assert [row["similarity"] for row in rows] == pytest.approx((features @ classifier)[0].tolist(), abs=1e-4)


def test_the_hash_of_a_job_follows_the_classes_and_workers_need_no_file(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [sample("a", 1)])
    path = tmp_path / "classes.txt"

    def prepared(text):
        path.write_text(text)
        settings = {"source": "classes", "classes": str(path), "background": "default"}
        return jobs.prepare_job(demo_job([shard], tmp_path / "out", prompts=settings))

    job = prepared("dog\ncat\n")
    written = OutputFolder(str(tmp_path / "out")).job().config["prompts"]
    assert [entry["name"] for entry in written["classes"]] == ["dog", "cat"]
    assert "sky" in written["background"]
    assert prepared("dog\ncat\n\n").stamp.config_hash == job.stamp.config_hash
    changed = prepared("dog\ncow\n")
    assert changed.stamp.config_hash != job.stamp.config_hash
    path.unlink()
    assert [entry.name for entry in changed.config.prompts.classes] == ["dog", "cow"]


def test_a_dry_run_counts_the_classes_that_samples_mention(tmp_path):
    captions = [b"a dog and a cat", b"a cow", b"dogs"]
    shard = write_shard(tmp_path / "0.tar", [sample(str(i), i, txt=text) for i, text in enumerate(captions)])
    settings = {"source": "classes", "classes": ["dog", "cat", "pig"]}
    mentioned = dry_run(demo_job([shard], tmp_path / "out", prompts={**settings, "mentioned_in": "txt"}))
    assert (mentioned.probe.samples, mentioned.probe.prompts) == (3, 3)
    everything = dry_run(demo_job([shard], tmp_path / "out", prompts={**settings, "max_per_sample": 2}))
    assert (everything.probe.samples, everything.probe.prompts) == (3, 6)

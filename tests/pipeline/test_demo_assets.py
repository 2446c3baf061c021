"""The demo: what is shipped, the generator of scenes, and the training program on synthetic sprites."""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from pipeline.demo import assets
from pipeline.demo.making import art, backgrounds, batches, captions, losses, make_shards, train, vocabulary
from pipeline.demo.making.concepts import CONCEPTS, DISTRACTOR_CODES, NAMED, Concept
from pipeline.demo.making.curriculum import FULL_PLAN, Phase, Plan, scaled, schedule
from pipeline.demo.making.scenes import (
    Scene,
    SceneObject,
    SceneStyle,
    SpriteMips,
    render,
    render_seg,
    sample_scene,
)

MIB = 1 << 20


def synthetic_art(artist: str = "synthetic", seed: int = 0) -> art.ArtBox:
    """A random disc for every code point, and one photo of noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[-1:1:24j, -1:1:24j]
    sprites = {}
    for code in sorted(art.wanted_codes()):
        sprite = rng.integers(0, 256, (24, 24, 4), dtype=np.uint8)
        sprite[..., 3] = 255 * (rows**2 + columns**2 < 1)
        sprites[artist, code] = sprite
    return art.ArtBox(sprites, {"noise-photo": rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)})


def square_object(class_id: int, centre_x: float, centre_y: float, long_side: float) -> SceneObject:
    return SceneObject(
        class_id=class_id,
        sprite=("square", "s"),
        centre_x=centre_x,
        centre_y=centre_y,
        long_side=long_side,
        angle=0.0,
        is_mirrored=False,
        colour_gains=(1.0, 1.0, 1.0),
        has_shadow=False,
    )


def square_scene(*objects: SceneObject, aspect: float = 1.0) -> tuple[Scene, SpriteMips]:
    scene = Scene(objects, "plain", aspect, clutter_count=0, blur=0.0, noise=0.0, texture_seed=3)
    return scene, SpriteMips(art.ArtBox({("square", "s"): np.full((32, 32, 4), 255, np.uint8)}, {}))


@pytest.fixture(scope="module")
def shipped_samples() -> dict[str, dict[str, dict[str, bytes]]]:
    samples: dict[str, dict[str, dict[str, bytes]]] = {}
    for set_name in assets.SHARD_SETS:
        by_key: dict[str, dict[str, bytes]] = defaultdict(dict)
        for path in assets.demo_shard_paths(set_name):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    by_key[key][extension] = tar.extractfile(member).read()
        samples[set_name] = dict(by_key)
    return samples


def test_weights_are_at_most_12_mb_and_shards_at_most_6_mb() -> None:
    shards = [path for name in assets.SHARD_SETS for path in assets.demo_shard_paths(name)]
    assert 1 * MIB < assets.demo_weights_path().stat().st_size <= 12e6
    assert 1 * MIB < sum(path.stat().st_size for path in shards) <= 6e6


def test_recorded_checksums_are_those_of_the_shipped_files() -> None:
    recorded = json.loads(assets.demo_checksums_path().read_text())
    assert recorded == assets.actual_checksums()
    assert len(recorded) == 1 + sum(shard_set.shard_count for shard_set in make_shards.SETS)


def test_there_are_enough_scenes_in_both_sets(shipped_samples: dict) -> None:
    assert len(shipped_samples["heldout"]) >= 160
    assert len(shipped_samples["newartist"]) >= 128


def test_every_sample_has_its_three_members(shipped_samples: dict) -> None:
    for samples in shipped_samples.values():
        for key, members in samples.items():
            assert set(members) == {"jpg", "json", "seg.png"}, key


def test_ground_truth_holds_exactly_the_classes_that_the_captions_name(shipped_samples: dict) -> None:
    classes = assets.demo_classes()
    for samples in shipped_samples.values():
        for key, members in samples.items():
            description = json.loads(members["json"])
            seg = Image.open(io.BytesIO(members["seg.png"]))
            assert seg.size == Image.open(io.BytesIO(members["jpg"])).size, key
            labels, counts = np.unique(np.asarray(seg), return_counts=True)
            assert set(labels.tolist()) - {0, 255} == set(description["class_ids"]), key
            assert counts[(labels > 0) & (labels < 255)].min() * 96**2 >= 40 * np.asarray(seg).size, key
            assert [classes[i - 1] for i in description["class_ids"]] == description["class_names"], key
            for phrase, name in zip(description["captions"], description["class_names"], strict=True):
                assert phrase.split()[-1] == name
                assert phrase in description["caption"]


def test_shards_show_every_class_and_all_three_shapes_of_image(shipped_samples: dict) -> None:
    samples = [members for named in shipped_samples.values() for members in named.values()]
    class_ids = {i for members in samples for i in json.loads(members["json"])["class_ids"]}
    sizes = {Image.open(io.BytesIO(members["jpg"])).size for members in samples}
    assert class_ids == set(range(1, 65))
    assert sizes == {(256, 256), (256, 192), (192, 256)}


def test_the_demo_model_loads_in_open_clip_as_it_is_and_knows_a_dog_from_a_car(shipped_samples: dict) -> None:
    name, weights = assets.register_demo_model(), str(assets.demo_weights_path())
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    tokens = open_clip.get_tokenizer(name)([f"a photo of a {word}" for word in assets.demo_classes()])
    single = [
        members
        for members in shipped_samples["heldout"].values()
        if len(json.loads(members["json"])["class_ids"]) == 1
    ][:40]
    images = torch.stack([preprocess(Image.open(io.BytesIO(members["jpg"]))) for members in single])
    with torch.no_grad():
        similarities = (
            model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T
        )
    truth = torch.tensor([json.loads(members["json"])["class_ids"][0] - 1 for members in single])
    assert tokens.shape == (64, 24)
    # Chance is 1 in 64. open_clip's default preprocess crops, so that some objects are cut.
    assert (similarities.argmax(dim=1) == truth).float().mean() > 0.6


def test_registering_the_demo_model_twice_changes_nothing() -> None:
    assert assets.register_demo_model() == assets.register_demo_model() == "legrad_demo_clip"
    assert open_clip.list_models().count("legrad_demo_clip") == 1


def test_an_unknown_set_of_shards_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'held-out'.*heldout, newartist"):
        assets.demo_shard_paths("held-out")


def test_what_is_evaluated_on_is_never_trained_on() -> None:
    assert not set(art.TRAIN_PHOTOS) & set(art.HELDOUT_PHOTOS)
    assert not set(backgrounds.TRAIN_PATTERNS) & set(backgrounds.HELDOUT_PATTERNS)
    assert set(backgrounds.TRAIN_PATTERNS) | set(backgrounds.HELDOUT_PATTERNS) == set(backgrounds.PATTERNS)
    trained = {artist.package for artist in art.TRAIN_ARTISTS.values()}
    unseen, third = art.UNSEEN_ARTISTS.values(), art.THIRD_ARTISTS.values()
    assert not trained & {artist.package for artist in (*unseen, *third)}


def test_classes_are_64_and_named_as_the_concepts() -> None:
    assert assets.demo_classes() == [concept.name for concept in CONCEPTS]
    assert len(set(assets.demo_classes())) == 64
    assert not set(DISTRACTOR_CODES) & {code for concept in CONCEPTS for code in concept.codes}


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    box = synthetic_art("fluent")
    shard_set = replace(make_shards.SETS[0], artists={"fluent": art.TRAIN_ARTISTS["fluent"]})
    first, again, other = (
        [next(samples) for _ in range(5)]
        for samples in (
            make_shards.sample_scenes(shard_set, box),
            make_shards.sample_scenes(shard_set, box),
            make_shards.sample_scenes(replace(shard_set, seed=5), box),
        )
    )
    for sample, same in zip(first, again, strict=True):
        assert sample.class_ids == same.class_ids
        np.testing.assert_array_equal(sample.pixels, same.pixels)
        np.testing.assert_array_equal(sample.seg, same.seg)
    assert [sample.class_ids for sample in first] != [sample.class_ids for sample in other]


def test_written_shards_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    box = synthetic_art("fluent")
    shard_set = make_shards.ShardSet("tiny", {"fluent": art.TRAIN_ARTISTS["fluent"]}, 2, 3, seed=1)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = make_shards.write_shards(shard_set, box, tmp_path / name)
        contents.append([path.read_bytes() for path in paths])
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("aspect", "height", "width"), [(1.0, 256, 256), (4 / 3, 192, 256), (3 / 4, 256, 192)]
)
def test_a_square_sprite_is_square_at_native_size(aspect: float, height: int, width: int) -> None:
    scene, mips = square_scene(square_object(7, 0.5, 0.5, 0.4), aspect=aspect)
    seg = render_seg(scene, mips, height, width, min_visible_share=0.0)
    side = 0.4 * (height * width) ** 0.5
    assert abs((seg == 7).any(axis=0).sum() - side) <= 1.5
    assert abs((seg == 7).any(axis=1).sum() - side) <= 1.5


def test_squashing_a_wide_scene_stretches_what_is_in_it() -> None:
    scene, mips = square_scene(square_object(7, 0.5, 0.5, 0.4), aspect=4 / 3)
    seg = render_seg(scene, mips, 96, 96, min_visible_share=0.0)
    ratio = (seg == 7).any(axis=1).sum() / (seg == 7).any(axis=0).sum()
    assert ratio == pytest.approx(4 / 3, abs=0.08)


def test_ground_truth_is_what_can_be_seen_of_an_object() -> None:
    behind, front = square_object(3, 0.4, 0.5, 0.4), square_object(0, 0.6, 0.5, 0.4)
    scene, mips = square_scene(behind, front)
    seg = render_seg(scene, mips, 100, 100, min_visible_share=0.0)
    # Behind spans 20..60 of 100 columns, and the unnamed object in front takes 40..80 away.
    assert set(np.flatnonzero((seg == 3).any(axis=0))) == set(range(20, 40))
    assert scene.class_ids == (3,)


def test_an_object_hardly_visible_is_ignored_rather_than_judged() -> None:
    behind, front = square_object(3, 0.5, 0.5, 0.4), square_object(9, 0.51, 0.5, 0.4)
    scene, mips = square_scene(behind, front)
    seg = render_seg(scene, mips, 100, 100, min_visible_share=0.01)
    assert set(np.unique(seg)) == {0, 9, 255}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_plan_renders_alike_at_every_size(seed: int) -> None:
    box = synthetic_art()
    mips = SpriteMips(box)
    style = SceneStyle(("synthetic",), ("noise-photo", *backgrounds.TRAIN_PATTERNS), aspects=(1.0,))
    scene = sample_scene(np.random.default_rng(seed), style, mips)
    small = render_seg(scene, mips, 64, 64, min_visible_share=0.0)
    large = render_seg(scene, mips, 256, 256, min_visible_share=0.0)
    pixels = render(scene, mips, box.photos, 64, 48)
    assert np.mean(small != large[2::4, 2::4]) < 0.03
    assert pixels.shape == (64, 48, 3)
    assert pixels.dtype == np.uint8


def test_single_and_neutral_scenes_hold_one_concept_and_none() -> None:
    mips, rng = SpriteMips(synthetic_art()), np.random.default_rng(0)
    single = SceneStyle(("synthetic",), ("plain",), single_share=1.0)
    neutral = SceneStyle(("synthetic",), ("plain",), neutral_share=1.0)
    assert {len(sample_scene(rng, single, mips).class_ids) for _ in range(40)} == {1}
    assert {len(sample_scene(rng, neutral, mips).class_ids) for _ in range(40)} == {0}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    class_ids=st.lists(st.integers(1, len(NAMED)), unique=True, min_size=1, max_size=5),
)
def test_captions_name_each_concept_that_they_should_and_no_other(seed: int, class_ids: list[int]) -> None:
    rng = np.random.default_rng(seed)
    words = set(captions.scene_caption(rng, class_ids, [False] * len(class_ids)).replace(",", " ").split())
    assert {index for index, concept in enumerate(NAMED, start=1) if words & words_of(concept)} == set(
        class_ids
    )


def words_of(concept: Concept) -> set[str]:
    return {word for text in (concept.name, concept.plural, *concept.synonyms) for word in text.split()}


def test_no_word_names_two_concepts() -> None:
    words = [word for concept in NAMED for word in words_of(concept)]
    assert len(words) == len(set(words))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    class_ids=st.lists(st.integers(1, len(NAMED)), unique=True, max_size=5).map(sorted),
)
def test_a_caption_names_part_of_what_a_scene_shows_and_something_of_it(
    seed: int, class_ids: list[int]
) -> None:
    named = captions.named_subset(np.random.default_rng(seed), class_ids)
    assert set(named) <= set(class_ids)
    assert bool(named) == bool(class_ids)


def test_unknown_words_are_no_concept_words() -> None:
    assert not set(captions.UNKNOWN_WORDS) & set(captions.all_known_words())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sets=st.lists(st.lists(st.integers(1, 5), unique=True, max_size=3), min_size=1, max_size=6),
)
def test_an_image_matches_its_caption_and_equal_ones_and_true_but_partial_ones_are_ignored(
    seed: int, sets: list[list[int]]
) -> None:
    rng = np.random.default_rng(seed)
    parts = [shown[: int(rng.integers(1, len(shown) + 1))] if shown else [] for shown in sets]
    same, ignored = losses.caption_relations(
        losses.concept_labels(sets, 64), losses.concept_labels(parts, 64)
    )
    for row, (shown, own) in enumerate(zip(map(set, sets), map(set, parts), strict=True)):
        for column, named in enumerate(map(set, parts)):
            assert bool(same[row, column]) == (named in (own, shown))
            assert bool(ignored[row, column]) == (
                bool(named) and named <= shown and named not in (own, shown)
            )


def test_with_one_positive_a_row_the_loss_is_cross_entropy() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(losses.multi_positive_loss(logits, torch.eye(5)), expected)


def test_sprites_are_read_from_the_archive_alone_and_nothing_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = tmp_path / "pack.tgz"
    artist = art.Artist("some-package", "1.0.0", "package/png/", ".png")
    write_archive(archive, {"package/png/1f436.png": png(9), "package/png/../../1f415.png": png(5)})
    sprites = dict(art.read_sprites(archive, artist, art.wanted_codes()))
    assert list(sprites) == ["1f436"]
    assert sprites["1f436"].shape == (9, 9, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["pack.tgz"]


def test_a_sprite_that_is_not_png_or_webp_is_refused(tmp_path: Path) -> None:
    artist = art.Artist("some-package", "1.0.0", "package/png/", ".png")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "GIF")
    write_archive(tmp_path / "pack.tgz", {"package/png/1f436.png": buffer.getvalue()})
    with pytest.raises(UnidentifiedImageError):
        list(art.read_sprites(tmp_path / "pack.tgz", artist, art.wanted_codes()))


def test_without_npm_the_error_says_that_npm_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is needed"):
        art.load_art(tmp_path / "cache", art.UNSEEN_ARTISTS, ())


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (side, side), (255, 0, 0, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the training's own processes; on a busy machine a pool of threads waits more than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_plan(steps: int) -> Plan:
    phase = Phase(
        16, steps, batch_size=6, single_share=1.0, clutter_share=0.0, neutral_share=0.0, learning_rate=1e-3
    )
    return Plan(phases=(phase,), processes=1, warmup_steps=2)


def test_the_learning_rate_warms_up_stays_and_falls_to_a_hundredth() -> None:
    rates = [rate for _, _, rate in schedule(FULL_PLAN)]
    assert len(rates) == FULL_PLAN.total_steps
    assert rates[0] < rates[100] < rates[200] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1.2e-3)
    assert rates[-1] == pytest.approx(1.2e-5, rel=0.01)
    assert scaled(FULL_PLAN, 0.01).total_steps == pytest.approx(0.01 * FULL_PLAN.total_steps, abs=5)


@pytest.mark.usefixtures("one_thread")
def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    box, plan = synthetic_art(), tiny_plan(8)
    vocab = vocabulary.CompactVocabulary(24)
    batch = batches.make_batch(np.random.default_rng(9), plan.phases[0], SpriteMips(box), box, vocab)
    untrained = train.batch_loss(
        train.start_training(plan, vocab, torch.device("cpu")).model, batch, (0, 0), plan
    )[0]
    trained = train.train(plan, box, tmp_path / "one.pt")
    again = train.train(plan, box, tmp_path / "two.pt")
    assert train.batch_loss(trained.model, batch, (0, 0), plan)[0] < untrained
    for name, weight in trained.average.items():
        assert torch.equal(weight, again.average[name]), name


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, plan, real_make_batch = synthetic_art(), tiny_plan(5), batches.make_batch
    straight = train.train(plan, box, tmp_path / "straight.pt")
    calls = []

    def failing_make_batch(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_make_batch(*arguments)

    monkeypatch.setattr(batches, "make_batch", failing_make_batch)
    with pytest.raises(KeyboardInterrupt):
        train.train(plan, box, tmp_path / "cut.pt", checkpoint_every=1)
    resumed = train.train(plan, box, tmp_path / "cut.pt", checkpoint_every=1)
    assert len(calls) == 4 + 2
    for name, weight in straight.average.items():
        assert torch.equal(weight, resumed.average[name]), name


@pytest.mark.usefixtures("one_thread")
def test_exported_weights_give_the_text_features_of_the_compact_model(tmp_path: Path) -> None:
    training = train.train(tiny_plan(3), synthetic_art(), tmp_path / "checkpoint.pt")
    train.export(tmp_path / "checkpoint.pt", tmp_path / "weights.safetensors")
    name = assets.register_demo_model()
    exported = open_clip.create_model(name, pretrained=str(tmp_path / "weights.safetensors"))
    texts = [
        "a photo of a dog",
        "two cats next to a zyzzyva",
        "a",
        "a small sunflower, scissors and a guitar",
    ]
    training.model.load_state_dict(training.average, strict=False)
    with torch.no_grad():
        compact = training.model.encode_text(vocabulary.CompactVocabulary(24).rows(texts))
        full = exported.encode_text(open_clip.get_tokenizer(name)(texts))
    torch.testing.assert_close(full, compact, atol=5e-3, rtol=5e-3)
    table = exported.token_embedding.weight
    assert table.shape == (49408, 48)
    assert (table.abs().sum(dim=1) > 0).sum() < 300

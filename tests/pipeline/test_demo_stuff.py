"""Stuff in the demo: textures, regions of backgrounds, the further sets of shards, and the warm start."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import legrad
from pipeline.demo import assets
from pipeline.demo.making import art, icons, make_shards, textures, train, vocabulary
from pipeline.demo.making.concepts import CONCEPTS, FIRST_STUFF_ID, NAMED, STUFF
from pipeline.demo.making.curriculum import STUFF_PLAN, Plan
from pipeline.demo.making.regions import UNNAMED, Border, Region
from pipeline.demo.making.scenes import (
    Scene,
    SceneObject,
    SceneStyle,
    SpriteMips,
    render,
    render_instances,
    render_seg,
    sample_scene,
)
from pipeline.evaluation.evaluate import evaluate_shards
from pipeline.prompts.sample_prompts import default_background

GRASS, SKY = (FIRST_STUFF_ID + [stuff.name for stuff in STUFF].index(name) for name in ("grass", "sky"))
LEVEL = Border(position=0.5, tilt=0.0, amplitude=0.0, turns=1.0, phase=0.0, is_upright=False)
TEXTURES = {"green": np.full((40, 40, 3), (30, 160, 40), np.uint8)}


def square(class_id: int, centre_x: float, long_side: float = 0.2) -> SceneObject:
    return SceneObject(
        class_id=class_id,
        sprite=("square", "s"),
        centre_x=centre_x,
        centre_y=0.5,
        long_side=long_side,
        angle=0.0,
        is_mirrored=False,
        colour_gains=(1.0, 1.0, 1.0),
        has_shadow=False,
    )


def square_mips() -> SpriteMips:
    return SpriteMips(art.ArtBox({("square", "s"): np.full((32, 32, 4), 255, np.uint8)}, {}))


def ground_scene(*objects: SceneObject, clutter_count: int = 0) -> Scene:
    """Grass, and below the middle something unnamed."""
    return Scene(
        objects,
        "green",
        aspect=1.0,
        clutter_count=clutter_count,
        blur=0.0,
        noise=0.0,
        texture_seed=3,
        stuff_id=GRASS,
        second=Region(UNNAMED, "plain"),
        border=LEVEL,
    )


def read_set(set_name: str) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in assets.demo_shard_paths(set_name):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples[key][extension] = tar.extractfile(member).read()
    return dict(samples)


def label_map(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def further_samples() -> dict[str, dict[str, dict[str, bytes]]]:
    return {name: read_set(name) for name in assets.FURTHER_SHARD_SETS}


def test_ids_of_stuff_follow_those_of_things() -> None:
    names = assets.demo_classes_with_stuff_path().read_text(encoding="utf-8").splitlines()
    assert names == [concept.name for concept in NAMED]
    assert names[:64] == assets.demo_classes() == [concept.name for concept in CONCEPTS]
    assert names[FIRST_STUFF_ID - 1] == STUFF[0].name


@pytest.mark.parametrize("name", [stuff.name for stuff in STUFF])
def test_a_texture_is_decided_by_its_seed_and_drawn_in_another_way_where_it_is_held_out(name: str) -> None:
    first = textures.draw_texture(name, 5, is_heldout=False)
    others = [
        textures.draw_texture(name, 6, is_heldout=False),
        textures.draw_texture(name, 5, is_heldout=True),
    ]
    assert first.shape == (textures.SIDE_PIXELS, textures.SIDE_PIXELS, 3)
    np.testing.assert_array_equal(first, textures.draw_texture(name, 5, is_heldout=False))
    assert all((first != other).any() for other in others)


def test_photos_of_stuff_are_stuff_and_no_unnamed_backgrounds() -> None:
    photo = np.zeros((60, 60, 3), np.uint8)
    box = art.with_stuff(
        art.ArtBox({}, {"brick": photo, "coins": photo}), per_class=1, seed=1, is_heldout=False
    )
    assert set(box.photos) == {"coins"}
    wall = FIRST_STUFF_ID + [stuff.name for stuff in STUFF].index("wall")
    assert "brick" in box.stuff[wall]
    assert set(box.stuff) == set(range(FIRST_STUFF_ID, len(NAMED) + 1))
    assert {name for names in box.stuff.values() for name in names} <= set(box.pictures)


def test_ground_truth_of_stuff_is_its_region_without_objects_and_clutter() -> None:
    bare = render_seg(ground_scene(), square_mips(), 100, 100, min_visible_share=0.0)
    covered = render_seg(
        ground_scene(square(7, 0.3), square(UNNAMED, 0.7)), square_mips(), 100, 100, min_visible_share=0.0
    )
    assert set(np.unique(bare[:50])) == {GRASS}
    assert set(np.unique(bare[50:])) == {UNNAMED}
    assert covered[45, 30] == 7
    assert covered[45, 70] == UNNAMED
    assert covered[10, 50] == GRASS


def test_clutter_in_the_picture_is_what_the_ground_truth_of_stuff_leaves_out() -> None:
    scene = replace(ground_scene(clutter_count=5), second=None, border=None)
    pixels = render(scene, square_mips(), TEXTURES, 100, 100)
    seg = render_seg(scene, square_mips(), 100, 100, min_visible_share=0.0)
    grass_colour = np.median(pixels.reshape(-1, 3), axis=0)
    is_cluttered = (np.abs(pixels - grass_colour) > 3).any(axis=2)
    np.testing.assert_array_equal(seg == UNNAMED, is_cluttered)


def test_every_copy_is_an_instance_and_small_ones_are_ignored() -> None:
    scene = ground_scene(square(7, 0.2), square(7, 0.7), square(UNNAMED, 0.45, 0.1), square(9, 0.95, 0.05))
    instances = render_instances(scene, square_mips(), 100, 100, min_visible_share=0.01)
    assert instances[50, 20] == 1
    assert instances[50, 70] == 2
    assert instances[50, 45] == 0
    assert instances[50, 95] == 255


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_scene_shows_only_stuff_that_its_style_has(seed: int) -> None:
    style = SceneStyle(
        ("square",), ("plain",), neutral_share=1.0, stuff_share=1.0, stuff={GRASS: ("green",), SKY: ("blue",)}
    )
    scene = sample_scene(np.random.default_rng(seed), style, drawn_by("square"))
    assert scene.shows_stuff
    assert set(scene.class_ids) <= {GRASS, SKY}
    assert (scene.second is None) == (scene.border is None)


def drawn_by(artist: str) -> SpriteMips:
    sprites = {(artist, code): np.full((9, 9, 4), 255, np.uint8) for code in art.wanted_codes()}
    return SpriteMips(art.ArtBox(sprites, {}))


def test_an_artist_who_drew_few_things_is_asked_for_these_alone() -> None:
    mips = SpriteMips(art.ArtBox({("few", "1f436"): np.full((9, 9, 4), 255, np.uint8)}, {}))
    assert mips.class_ids == [1]


def test_the_first_sets_of_shards_are_those_of_before_to_the_byte() -> None:
    digest = hashlib.sha256()
    for path in assets.demo_shard_paths():
        digest.update(path.read_bytes())
    assert [path.name.partition("-")[0] for path in assets.demo_shard_paths()] == ["heldout"] * 4 + [
        "newartist"
    ] * 3
    assert digest.hexdigest() == "72bc6b268cb6a7d2d1d72e07470b8596509bc174ac9136e62f87e0b4d2a58bb3"


def test_further_sets_take_at_most_3_mib() -> None:
    paths = [path for name in assets.FURTHER_SHARD_SETS for path in assets.demo_shard_paths(name)]
    assert sum(path.stat().st_size for path in paths) <= 3 << 20


def test_further_samples_have_ground_truth_of_what_their_captions_name(further_samples: dict) -> None:
    names = assets.demo_classes_with_stuff_path().read_text(encoding="utf-8").splitlines()
    for samples in further_samples.values():
        for key, members in samples.items():
            assert set(members) == {"jpg", "json", "seg.png", "inst.png"}, key
            description, seg = json.loads(members["json"]), label_map(members["seg.png"])
            assert set(np.unique(seg).tolist()) - {0, 255} == set(description["class_ids"]), key
            assert [names[i - 1] for i in description["class_ids"]] == description["class_names"], key
            for phrase, name in zip(description["captions"], description["class_names"], strict=True):
                assert phrase.endswith(name)
                assert phrase in description["caption"]


def test_instances_lie_within_the_things_of_the_label_map(further_samples: dict) -> None:
    for samples in further_samples.values():
        for key, members in samples.items():
            seg, instances = label_map(members["seg.png"]), label_map(members["inst.png"])
            assert seg.shape == instances.shape, key
            assert set(np.unique(seg[(instances > 0) & (instances < 255)]).tolist()) <= set(range(1, 65)), key
            assert not (instances[(seg == 0) | ((seg > 64) & (seg < 255))]).any(), key
            for number in set(np.unique(instances).tolist()) - {0, 255}:
                assert len(np.unique(seg[instances == number])) == 1, key


def test_the_set_of_stuff_shows_every_kind_and_some_scenes_without_things(further_samples: dict) -> None:
    sets = [set(json.loads(members["json"])["class_ids"]) for members in further_samples["stuff"].values()]
    assert len(sets) >= 90
    assert set(range(FIRST_STUFF_ID, len(NAMED) + 1)) <= set.union(*sets)
    assert sum(min(shown) >= FIRST_STUFF_ID for shown in sets) >= 5
    assert all(max(shown) >= FIRST_STUFF_ID for shown in sets)


def test_scenes_of_duplicates_show_two_or_three_of_a_concept(further_samples: dict) -> None:
    for key, members in further_samples["duplicates"].items():
        seg, instances = label_map(members["seg.png"]), label_map(members["inst.png"])
        numbers = set(np.unique(instances).tolist()) - {0, 255}
        classes = [int(seg[instances == number][0]) for number in numbers]
        assert 2 <= max(classes.count(class_id) for class_id in classes) <= 3, key


def test_the_third_artist_drew_most_things(further_samples: dict) -> None:
    drawn = {
        i
        for members in further_samples["thirdartist"].values()
        for i in json.loads(members["json"])["class_ids"]
    }
    wanted = {code for concept in CONCEPTS for code in concept.codes}
    assert len(drawn) >= 50
    assert len(icons.FXEMOJI_NAMES.keys() & wanted) >= 70


@pytest.mark.parametrize("set_name", ["stuff", "thirdartist", "duplicates"])
def test_further_sets_are_drawn_the_same_each_time(set_name: str, tmp_path: Path) -> None:
    whole = next(shard_set for shard_set in make_shards.SETS if shard_set.name == set_name)
    few = replace(whole, artists={"square": art.Artist("p", "1")}, shard_count=1, scenes_per_shard=3)
    sprites = {("square", code): np.full((24, 24, 4), 200, np.uint8) for code in art.wanted_codes()}
    box = art.ArtBox(sprites, {"photo": np.full((50, 60, 3), 90, np.uint8)})
    if whole.stuff_share:
        box = art.with_stuff(box, per_class=1, seed=1, is_heldout=True)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        contents.append([path.read_bytes() for path in make_shards.write_shards(few, box, tmp_path / name)])
    assert contents[0] == contents[1]


def test_drawings_are_rendered_from_the_archive_alone(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    body = '<path fill="#f00" d="M0 0h256v512H0z"/>'
    content = json.dumps({"icons": {"dog": {"body": body}}, "height": 512}).encode()
    with tarfile.open(tmp_path / "pack.tgz", "w:gz") as tar:
        info = tarfile.TarInfo(icons.ICONS_MEMBER)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    ((code, pixels),) = icons.read_icons(tmp_path / "pack.tgz", {"1f436": "dog"}, {"1f436", "1f431"})
    assert code == "1f436"
    assert pixels[64, 30].tolist() == [255, 0, 0, 255]
    assert pixels[64, 100, 3] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pack.tgz"]


def test_a_package_without_drawings_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    with tarfile.open(tmp_path / "pack.tgz", "w:gz"):
        pass
    with pytest.raises(RuntimeError, match=r"has no package/icons\.json"):
        list(icons.read_icons(tmp_path / "pack.tgz", {"1f436": "dog"}, {"1f436"}))


def test_the_training_goes_on_from_the_weights_that_knew_things_alone() -> None:
    vocab = vocabulary.CompactVocabulary(24)
    assert hashlib.sha256(train.FIRST_WEIGHTS.read_bytes()).hexdigest() == train.FIRST_WEIGHTS_SHA256
    warm = train.start_training(STUFF_PLAN, vocab, torch.device("cpu")).model
    first = open_clip.create_model(assets.register_demo_model(), pretrained=str(train.FIRST_WEIGHTS))
    tokens = open_clip.get_tokenizer(assets.DEMO_MODEL_NAME)
    with torch.no_grad():
        rows = vocab.rows(["a photo of a dog", "two cats"])
        known = warm.encode_text(rows)
        torch.testing.assert_close(
            known, first.encode_text(tokens(["a photo of a dog", "two cats"])), atol=1e-4, rtol=1e-4
        )
        new = warm.encode_text(vocab.rows(["grass", "sky"]))
    assert (new[0] - new[1]).abs().max() > 1e-4


def test_other_weights_to_go_on_from_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    monkeypatch.setattr(train, "FIRST_WEIGHTS", other)
    with pytest.raises(ValueError, match=f"expected {train.FIRST_WEIGHTS_SHA256}"):
        train.start_training(
            Plan(phases=(), is_warm_start=True), vocabulary.CompactVocabulary(24), torch.device("cpu")
        )


def test_exported_weights_lie_between_the_trained_and_the_first_ones() -> None:
    vocab = vocabulary.CompactVocabulary(24)
    first = train.read_first_weights(vocab)
    trained = {name: weight + 1 for name, weight in first.items()}
    mixed = train.mixed(trained, vocab, 0.25)
    table = "token_embedding.weight"
    is_new = first[table].abs().sum(dim=1) == 0
    torch.testing.assert_close(mixed["visual.proj"], first["visual.proj"] + 0.75)
    torch.testing.assert_close(mixed[table][~is_new], first[table][~is_new] + 0.75)
    assert torch.equal(mixed[table][is_new], trained[table][is_new])
    assert 40 < is_new.sum() < 90


def test_the_model_tells_most_of_the_shipped_texts_for_backgrounds_apart() -> None:
    name = assets.register_demo_model()
    model = open_clip.create_model(name, pretrained=str(assets.demo_weights_path()))
    texts = list(default_background())
    with torch.no_grad():
        embeddings = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    cosines = (embeddings @ embeddings.T).fill_diagonal_(-1)
    assert (cosines.amax(dim=1) >= 0.99).sum() <= len(texts) / 2


@pytest.mark.slow
def test_the_model_recognises_and_finds_stuff_that_is_drawn_in_a_way_it_never_saw() -> None:
    classes = assets.demo_classes_with_stuff_path().read_text(encoding="utf-8").splitlines()
    found = evaluate_shards(shipped_explainer(), assets.demo_shard_paths("stuff"), classes)
    last_4 = next(scores for scores in found.maps if scores.method == "LeGrad, last 4")
    assert last_4.pointing.value > 0.90
    assert last_4.average_precision.value > 0.82
    assert found.recognition.top1.value > 0.90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("set_name", "pointing", "average_precision", "top1"),
    [("heldout", 0.88, 0.76, 0.90), ("newartist", 0.69, 0.62, 0.45), ("thirdartist", 0.75, 0.63, 0.38)],
)
def test_things_are_found_as_well_as_before_there_was_stuff(
    set_name: str, pointing: float, average_precision: float, top1: float
) -> None:
    found = evaluate_shards(shipped_explainer(), assets.demo_shard_paths(set_name), assets.demo_classes())
    last_4 = next(scores for scores in found.maps if scores.method == "LeGrad, last 4")
    assert last_4.pointing.value > pointing
    assert last_4.average_precision.value > average_precision
    assert found.recognition.top1.value > top1


def shipped_explainer() -> legrad.LeGrad:
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=4
    )

"""Training reads each sample once, with its own masks, in bounded memory."""

import json
import logging
import os
import pickle
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from pipeline import storage
from pipeline.errors import DamagedFileError, ShardError, UserError
from pipeline.output import folder as output_folder
from pipeline.output import joining
from pipeline.output.joining import shares_of
from pipeline.training import MaskDataset, collate, pixel_weights, similarity_weight
from tests.helpers.training_corpus import (
    HEIGHT,
    OUTCOMES,
    WIDTH,
    Planned,
    annotate,
    begin_job,
    class_of,
    mask_of,
    members_of,
    number_of,
    picture,
    png,
    rle,
    row,
    rows_of,
    write_corpus,
    write_tar,
)


def plain_plans(sizes, prompts=1):
    numbers = iter(range(sum(sizes)))
    return [[Planned(next(numbers), prompts=prompts) for _ in range(size)] for size in sizes]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three shards of 5, 1 and 7 good samples of two prompts."""
    return write_corpus(tmp_path_factory.mktemp("plain"), plain_plans([5, 1, 7], prompts=2))


def numbers(samples):
    return [int(sample["key"][1:]) for sample in samples]


def write_copy(path, members):
    """A shard of the same name in another folder, where it may be packed otherwise."""
    folder = path.parent / "copies"
    folder.mkdir()
    return write_tar(folder / path.name, members)


@given(
    sizes=st.lists(st.integers(0, 9), max_size=9),
    readers=st.integers(1, 12),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_every_sample_has_exactly_one_reader_however_many_shards_and_readers_there_are(
    sizes, readers, epoch, shuffle
):
    seen, loads = Counter(), []
    for reader in range(readers):
        shares = shares_of(range(len(sizes)), reader, readers, epoch=epoch, seed=5, shuffle=shuffle)
        loads.append(len(shares))
        seen.update((s.shard, index) for s in shares for index in range(sizes[s.shard]) if s.has(index))
    assert seen == Counter((shard, index) for shard, size in enumerate(sizes) for index in range(size))
    assert max(loads) - min(loads) <= 0 or not sizes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_ranks_and_their_workers_share_an_epoch_so_that_each_sample_comes_once(corpus, workers):
    found = []
    for rank in range(2):
        dataset = MaskDataset(corpus.out, rank=rank, world_size=2)
        found += numbers(DataLoader(dataset, batch_size=None, num_workers=workers))
        assert dataset.counts().joined == dataset.counts().samples
    assert sorted(found) == list(range(13))


def test_workers_that_live_on_see_the_next_epoch_and_each_epoch_is_complete(corpus):
    dataset = MaskDataset(corpus.out)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(numbers(loader))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(13))
    assert dataset.counts().joined == 13


def test_the_seed_decides_the_order_and_without_shuffling_it_is_that_of_the_shards(corpus):
    def order(**options):
        return numbers(MaskDataset(corpus.out, **options))

    assert order(seed=3) == order(seed=3) != order(seed=4)
    assert order(shuffle=False) == list(range(13))


def test_a_buffer_of_one_shuffles_shards_alone(corpus):
    shards = [sample["shard"] for sample in MaskDataset(corpus.out, shuffle_buffer=1, seed=1)]
    assert len(list(dict.fromkeys(shards))) == 3
    assert shards == sorted(shards, key=list(dict.fromkeys(shards)).index)


def test_the_place_among_ranks_is_that_of_torch_distributed_also_in_workers_started_anew(corpus, monkeypatch):
    dataset = MaskDataset(corpus.out)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    here, sent = numbers(dataset), pickle.dumps(dataset)
    monkeypatch.undo()
    elsewhere = pickle.loads(sent)
    assert here == numbers(elsewhere) == numbers(MaskDataset(corpus.out, rank=1, world_size=3))
    assert 0 < len(here) < 13


PLANS = st.lists(st.lists(st.sampled_from(OUTCOMES), max_size=6), min_size=1, max_size=4)
KIND_OF_OUTCOME = {
    "annotated": "joined",
    "empty": "without_rows",
    "failed": "without_rows",
    "rejected": "without_mask",
    "broken image": "undecodable",
    "foreign key": "mispaired",
    "foreign size": "mispaired",
    "twice": "damaged",
}


@settings(max_examples=25)
@given(outcomes=PLANS, data=st.data())
def test_no_image_ever_comes_with_the_mask_of_another_and_all_samples_are_accounted_for(
    tmp_path_factory, outcomes, data
):
    numbered = iter(range(300, 400))
    plans = [[Planned(next(numbered), outcome) for outcome in shard] for shard in outcomes]
    missing = data.draw(st.sets(st.integers(0, len(plans) - 1), max_size=len(plans) - 1))
    corpus = write_corpus(tmp_path_factory.mktemp("hostile"), plans, not_annotated=missing)
    dataset = MaskDataset(corpus.out, seed=data.draw(st.integers(0, 5)))
    found = list(dataset)
    for sample in found:
        number = number_of(sample["image"])
        assert sample["key"] == f"s{number:06d}"
        assert ((sample["label_map"] == class_of(number)).numpy() == mask_of(number)).all()
    read = [item for shard, plan in enumerate(plans) if shard not in missing for item in plan]
    assert sorted(numbers(found)) == [item.number for item in read if item.outcome == "annotated"]
    expected = Counter(KIND_OF_OUTCOME[item.outcome] for item in read)
    counts = dataset.counts()
    assert {kind: getattr(counts, kind) for kind in expected} == expected
    assert counts.samples == len(read)
    assert len(dataset.omitted) == len(missing)


def test_rows_of_samples_that_the_shard_does_not_have_are_counted(tmp_path):
    corpus = write_corpus(tmp_path, plain_plans([3]))
    copy = write_copy(corpus.shards[0], members_of(corpus.planned[0][0]))
    dataset = MaskDataset(corpus.out, str(copy))
    assert numbers(dataset) == [0]
    assert dataset.counts().rows_without_sample == 2


def test_another_shard_under_the_same_name_gives_no_sample_at_all(tmp_path):
    corpus = write_corpus(tmp_path, plain_plans([4]))
    others = [Planned(number) for number in range(50, 54)]
    copy = write_copy(corpus.shards[0], [member for item in others for member in members_of(item)])
    dataset = MaskDataset(corpus.out, str(copy))
    assert list(dataset) == []
    assert dataset.counts().mispaired == 4


def test_a_shard_that_changed_in_its_place_gives_no_sample_and_is_named(tmp_path, caplog):
    corpus = write_corpus(tmp_path, plain_plans([3, 2]))
    replaced = [members_of(Planned(item.number + 40)) for item in corpus.planned[0]]
    names = [members_of(item) for item in corpus.planned[0]]
    # other pictures under the same keys, of the same sizes
    write_tar(
        corpus.shards[0],
        [
            (name, data)
            for old, new in zip(names, replaced, strict=True)
            for (name, _), (_, data) in zip(old, new, strict=True)
        ],
    )
    dataset = MaskDataset(corpus.out)
    with caplog.at_level(logging.WARNING):
        assert sorted(numbers(dataset)) == [3, 4]
    assert dataset.counts().shards_omitted == 1
    assert "000.tar: changed since it was annotated" in caplog.text


def test_a_shard_that_was_only_touched_is_read_as_before(tmp_path):
    corpus = write_corpus(tmp_path, plain_plans([3]))
    os.utime(corpus.shards[0], (1, 1))
    assert sorted(numbers(MaskDataset(corpus.out))) == [0, 1, 2]


def test_files_of_two_attempts_are_skipped_and_named(tmp_path, caplog):
    corpus = write_corpus(tmp_path, plain_plans([2, 2]))
    names = sorted((tmp_path / "out" / "errors").iterdir())
    shutil.copyfile(names[0], names[1])
    dataset = MaskDataset(corpus.out)
    with caplog.at_level(logging.WARNING):
        assert len(list(dataset)) == 2
    assert dataset.counts().shards_omitted == 1
    assert names[1].name in caplog.text


def test_files_of_another_configuration_than_the_jobs_are_skipped_and_named(tmp_path, caplog):
    corpus = write_corpus(tmp_path, plain_plans([2, 2]))
    path = tmp_path / "out" / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "1" * 16}))
    dataset = MaskDataset(corpus.out)
    with caplog.at_level(logging.WARNING):
        assert list(dataset) == []
    assert dataset.counts().shards_omitted == 2
    assert "is of another configuration than the job" in caplog.text


def test_a_shard_that_cannot_be_read_ends_the_epoch_or_is_skipped(tmp_path, caplog):
    corpus = write_corpus(tmp_path, plain_plans([2, 2]))
    corpus.shards[0].unlink()
    with pytest.raises(ShardError, match=r"000\.tar"):
        list(MaskDataset(corpus.out))
    dataset = MaskDataset(corpus.out, skip_unreadable=True)
    assert sorted(numbers(dataset)) == [2, 3]
    assert dataset.counts().shards_omitted == 1
    assert "000.tar" in caplog.text


def test_a_broken_annotations_file_is_an_unreadable_shard(tmp_path):
    corpus = write_corpus(tmp_path, plain_plans([2]))
    (file,) = (tmp_path / "out" / "annotations").iterdir()
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DamagedFileError, match=file.name):
        list(MaskDataset(corpus.out))


def test_images_that_moved_are_found_by_stem_and_by_old_and_new(tmp_path):
    corpus = write_corpus(tmp_path / "here", plain_plans([2, 3]))
    there = tmp_path / "there"
    there.mkdir()
    for path in corpus.shards:
        shutil.move(path, there / path.name)
    for given_shards in (str(there / "*.tar"), [f"{tmp_path / 'here'}={there}"]):
        assert sorted(numbers(MaskDataset(corpus.out, given_shards))) == list(range(5))


def two_sample_job(tmp_path, rows):
    """One shard with one sample of the given rows."""
    path = write_tar(tmp_path / "a.tar", members_of(Planned(1)))
    (shard,) = begin_job([path], tmp_path / "out")
    annotate(tmp_path / "out", shard, [rows])
    return str(tmp_path / "out")


masks_of_random_pixels = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).random((HEIGHT, WIDTH)) < 0.4
)


@settings(max_examples=15)
@given(
    masks=st.lists(masks_of_random_pixels, min_size=1, max_size=4),
    similarities=st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4, unique=True),
    ignore=st.none() | masks_of_random_pixels,
)
def test_a_label_map_is_what_pixel_by_pixel_the_most_similar_mask_says(
    tmp_path_factory, masks, similarities, ignore
):
    rows = [
        row("s000001", 0, index, mask=mask, class_id=3 + index, similarity=similarities[index])
        for index, mask in enumerate(masks)
    ]
    rows[0]["ignore"] = None if ignore is None else rle(ignore)
    expected = np.zeros((HEIGHT, WIDTH), dtype=int)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            covering = [item for mask, item in zip(masks, rows, strict=True) if mask[y, x]]
            if covering:
                expected[y, x] = max(covering, key=lambda item: item["similarity"])["class_id"]
            elif ignore is not None and ignore[y, x]:
                expected[y, x] = 255
    (sample,) = MaskDataset(two_sample_job(tmp_path_factory.mktemp("label"), rows))
    assert (sample["label_map"].numpy() == expected).all()
    assert isinstance(sample["label_map"], tv_tensors.Mask)
    assert isinstance(sample["image"], tv_tensors.Image)


def test_masks_come_one_for_each_accepted_prompt_with_what_belongs_to_it(tmp_path):
    ignore = np.zeros((HEIGHT, WIDTH), dtype=bool)
    ignore[5] = True
    rows = [
        row("s000001", 0, 0, mask=mask_of(3), similarity=0.2, prompt="a dog"),
        row("s000001", 0, 1, mask=None, prompt="a cat"),
        row("s000001", 0, 2, mask=mask_of(4), similarity=0.3, class_id=9, ignore=rle(ignore), prompt="a cow"),
    ]
    out = two_sample_job(tmp_path, rows)
    (sample,) = MaskDataset(out, target="masks", similarity_range=(0.1, 0.3))
    assert sample["prompts"] == ["a dog", "a cow"]
    assert sample["class_ids"].tolist() == [-1, 9]
    torch.testing.assert_close(sample["weights"], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(sample["similarities"], torch.tensor([0.2, 0.3]))
    first, second = sample["masks"].numpy()
    assert (first == mask_of(3)).all()
    assert (second == np.where(mask_of(4), 1, np.where(ignore, 255, 0))).all()


def test_prompts_that_competed_for_pixels_share_what_is_ignored(tmp_path):
    ignore = np.zeros((HEIGHT, WIDTH), dtype=bool)
    ignore[5] = True
    competing = {"threshold": None, "ignore": rle(ignore)}
    rows = [
        row("s000001", 0, 0, mask=None, class_id=3),
        row("s000001", 0, 1, mask=mask_of(2), class_id=4, **competing),
        row("s000001", 0, 2, mask=mask_of(4, 2) & ~mask_of(2), class_id=5, **competing),
    ]
    (sample,) = MaskDataset(two_sample_job(tmp_path, rows), target="masks")
    for place, mask in enumerate([mask_of(2), mask_of(4, 2) & ~mask_of(2)]):
        assert (sample["masks"][place].numpy() == np.where(mask, 1, np.where(ignore, 255, 0))).all()


@pytest.mark.parametrize("target", ["masks", "label_map"])
def test_a_prompt_that_won_no_pixel_teaches_nothing(tmp_path, target):
    nothing = np.zeros((HEIGHT, WIDTH), dtype=bool)
    empty = row("s000001", 0, 0, mask=nothing, status="empty_mask", class_id=3, similarity=0.9)
    fine = row("s000001", 0, 1, mask=mask_of(2), class_id=4, similarity=0.2)
    for folder in ("two", "alone"):
        (tmp_path / folder).mkdir()
    (sample,) = MaskDataset(two_sample_job(tmp_path / "two", [empty, fine]), target=target)
    if target == "masks":
        assert sample["class_ids"].tolist() == [4]
    else:
        assert sample["label_weights"].nonzero().flatten().tolist() == [0, 4]
        assert (sample["label_map"].numpy() == 4 * mask_of(2)).all()
    alone = MaskDataset(two_sample_job(tmp_path / "alone", [empty]), target=target)
    assert list(alone) == []
    assert alone.counts().without_mask == 1


def test_classes_can_be_given_for_captions_and_other_captions_are_skipped(tmp_path):
    rows = [
        row("s000001", 0, 0, mask=mask_of(1), prompt="a dog"),
        row("s000001", 0, 1, mask=mask_of(9, prompt=2), prompt="a summer day", similarity=0.9),
    ]
    out = two_sample_job(tmp_path, rows)
    named = MaskDataset(out, classes=[{"name": "dog", "id": 17}, {"name": "cat", "id": 18}])
    (sample,) = named
    assert (sample["label_map"].numpy() == 17 * mask_of(1)).all()
    assert named.counts().rows_without_class == 1
    classes_file = tmp_path / "classes.txt"
    classes_file.write_text("cat\ncow\n")
    unknown = MaskDataset(out, classes=classes_file)
    assert list(unknown) == []
    assert unknown.counts().without_mask == 1
    (masks,) = MaskDataset(out, target="masks", classes=["dog"])
    assert masks["class_ids"].tolist() == [1, -1]
    with pytest.raises(UserError, match="classes: 1 problem"):
        MaskDataset(out, classes=["dog", "dog"])
    with pytest.raises(UserError, match="class ids"):
        list(MaskDataset(out))


def test_ground_truth_comes_for_the_same_samples(corpus):
    found = list(MaskDataset(corpus.out, target="ground_truth"))
    assert sorted(numbers(found)) == list(range(13))
    for sample in found:
        assert (sample["label_map"] == class_of(number_of(sample["image"]))).all()


def test_ground_truth_of_another_size_or_missing_is_counted(tmp_path):
    small = png(np.zeros((HEIGHT, WIDTH - 1), dtype=np.uint8))
    items = [Planned(1), Planned(2)]
    corpus = write_corpus(tmp_path, [items])
    members = [
        *[(name, small if name.endswith("seg.png") else data) for name, data in members_of(items[0])],
        *[(name, data) for name, data in members_of(items[1]) if not name.endswith("seg.png")],
    ]
    copy = write_copy(corpus.shards[0], members)
    dataset = MaskDataset(corpus.out, str(copy), target="ground_truth")
    assert list(dataset) == []
    assert dataset.counts().undecodable == 2


TRANSFORMS = (
    v2.RandomHorizontalFlip(p=1),
    v2.RandomVerticalFlip(p=1),
    v2.RandomCrop((4, 7)),
    v2.RandomHorizontalFlip(p=0.5),
    v2.Pad(3, fill={tv_tensors.Image: 0, tv_tensors.Mask: 0}),
    v2.Resize((2 * HEIGHT, 2 * WIDTH), interpolation=v2.InterpolationMode.NEAREST),
)


@settings(max_examples=25)
@given(
    chosen=st.lists(st.sampled_from(range(len(TRANSFORMS))), min_size=1, max_size=3, unique=True),
    mask=masks_of_random_pixels,
    target=st.sampled_from(["label_map", "masks"]),
)
def test_a_transform_moves_image_and_mask_alike(tmp_path_factory, chosen, mask, target):
    folder = tmp_path_factory.mktemp("moved")
    out = two_sample_job(folder, [row("s000001", 0, mask=mask, class_id=1)])
    white_where_masked = np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    # elsewhere: a shard that changed in its place is refused
    (folder / "white").mkdir()
    images = write_tar(folder / "white" / "a.tar", [("s000001.png", png(white_where_masked))])
    transform = v2.Compose([TRANSFORMS[index] for index in chosen])
    (sample,) = MaskDataset(out, str(images), target=target, transform=transform)
    found = sample["label_map"] if target == "label_map" else sample["masks"][0]
    assert torch.equal(sample["image"][0] == 255, found == 1)


def test_ragged_prompts_are_joined_along_the_prompts_of_all_images(tmp_path):
    plans = [[Planned(1, prompts=1), Planned(2, prompts=3), Planned(3, prompts=2)]]
    corpus = write_corpus(tmp_path, plans)
    dataset = MaskDataset(corpus.out, target="masks", shuffle=False)
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=collate)
    assert batch["image"].shape == (3, 3, HEIGHT, WIDTH)
    assert batch["image_index"].tolist() == [0, 1, 1, 1, 2, 2]
    assert batch["masks"].shape == (6, HEIGHT, WIDTH)
    assert batch["prompts"] == [f"text {index}" for index in (0, 0, 1, 2, 0, 1)]
    assert batch["key"] == ["s000001", "s000002", "s000003"]
    for mask, image, text in zip(batch["masks"], batch["image_index"], batch["prompts"], strict=True):
        assert (mask.numpy() == mask_of(int(image) + 1, int(text[-1]))).all()


def test_images_of_different_sizes_make_no_batch_and_the_error_says_what_to_do():
    samples = [{"image": tv_tensors.Image(torch.zeros(3, side, 4)), "key": str(side)} for side in (4, 5)]
    with pytest.raises(UserError, match=r"\(3, 4, 4\) and \(3, 5, 4\).*resize"):
        collate(samples)


def test_weights_follow_similarity_between_the_ends_of_its_range():
    assert [similarity_weight(value, (0.1, 0.3)) for value in (-1, 0.1, 0.15, 0.2, 0.3, 1)] == pytest.approx(
        [0, 0, 0.25, 0.5, 1, 1]
    )
    assert similarity_weight(-1, None) == 1


def test_pixels_weigh_what_their_label_weighs_and_nothing_where_they_are_ignored(tmp_path):
    rows = [
        row("s000001", 0, 0, mask=mask_of(1), class_id=7, similarity=0.15),
        row("s000001", 0, 1, mask=mask_of(1, prompt=5), class_id=8, similarity=0.3),
    ]
    ignore = np.zeros((HEIGHT, WIDTH), dtype=bool)
    ignore[-1] = True
    rows[0]["ignore"] = rle(ignore)
    dataset = MaskDataset(two_sample_job(tmp_path, rows), similarity_range=(0.1, 0.3))
    (batch,) = DataLoader(dataset, batch_size=1, collate_fn=collate)
    weights = pixel_weights(batch["label_map"], batch["label_weights"])[0]
    labels = batch["label_map"][0]
    for label, weight in ((7, 0.25), (8, 1.0), (0, 0.625), (255, 0.0)):
        assert (labels == label).any()
        torch.testing.assert_close(
            weights[labels == label], torch.full_like(weights[labels == label], weight)
        )


def test_the_first_sample_comes_before_either_file_has_been_read(tmp_path, monkeypatch):
    # pictures of noise, and masks of noise in many rows, so that both files are large
    rng = np.random.default_rng(0)
    side, samples = 64, 90
    paths = [
        (f"k{index}.png", png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))
        for index in range(samples)
    ]
    path = write_tar(tmp_path / "a.tar", paths)
    noise = rle(rng.random((side, side)) < 0.5)
    sizes = {"image_height": side, "image_width": side, "class_id": 1}
    (shard,) = begin_job([path], tmp_path / "out")
    rows = [
        [
            row(f"k{index}", index, prompt, mask=np.ones((1, 1)), **sizes) | {"mask": noise}
            for prompt in range(20)
        ]
        for index in range(samples)
    ]
    annotate(tmp_path / "out", shard, rows)
    tar_bytes = Counter()

    @contextmanager
    def counted_shard(shard):
        with (tmp_path / "a.tar").open("rb") as file:
            read = file.read

            class Stream:
                def read(self, size=-1):
                    data = read(size)
                    tar_bytes["read"] += len(data)
                    return data

            yield Stream()

    monkeypatch.setattr(joining.storage, "open_shard", counted_shard)
    monkeypatch.setattr(output_folder, "open_table", counted_annotations(output_folder.open_table, tar_bytes))
    samples_read = iter(MaskDataset(str(tmp_path / "out"), shuffle=False))
    next(samples_read)
    assert 0 < tar_bytes["read"] < path.stat().st_size / 2
    assert tar_bytes["rows"] <= 512 < samples * 20
    assert len(list(samples_read)) == samples - 1


def counted_annotations(opened, counts):
    @contextmanager
    def opening(url, table):
        with opened(url, table) as annotations:
            yield replace(annotations, file=Counted(annotations.file, counts))

    return opening


class Counted:
    """A Parquet file that counts the rows taken from it."""

    def __init__(self, file, counts):
        self._file, self._counts = file, counts
        self.metadata = file.metadata

    def iter_batches(self, *args, **options):
        for batch in self._file.iter_batches(*args, **options):
            self._counts["rows"] += batch.num_rows
            yield batch


def test_what_needs_a_length_is_refused_with_the_way_out(corpus):
    dataset = MaskDataset(corpus.out)
    for ask in (len, lambda data: len(DataLoader(data)), lambda data: DistributedSampler(data, 2, 0)):
        with pytest.raises(TypeError, match=r"no length.*fixed number of steps.*set_epoch"):
            ask(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "boxes"}, "label_map"),
        ({"similarity_range": (0.3, 0.3)}, "similarity_range"),
        ({"rank": 1}, "world_size"),
        ({"rank": 2, "world_size": 2}, "0 to 1"),
    ],
)
def test_arguments_out_of_their_range_are_refused(corpus, options, message):
    with pytest.raises(UserError, match=message):
        MaskDataset(corpus.out, **options)


def test_a_folder_without_a_job_or_without_annotations_is_refused(tmp_path):
    with pytest.raises(UserError):
        MaskDataset(tmp_path)
    corpus = write_corpus(tmp_path / "job", plain_plans([1]), not_annotated={0})
    with pytest.raises(UserError, match="has no annotations"):
        MaskDataset(corpus.out)


def test_an_object_store_serves_images_and_masks_but_not_to_forked_workers(
    tmp_path, only_loopback, store, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    store.put("training", b"")
    items = plain_plans([3])[0]
    path = write_tar(tmp_path / "a.tar", [member for item in items for member in members_of(item)])
    store.put("training/data/a.tar", path.read_bytes())
    url = "s3://training/data/a.tar"
    (shard,) = begin_job([url], "s3://training/out")
    annotate("s3://training/out", shard, [rows_of(item, index) for index, item in enumerate(items)])
    with pytest.raises(UserError, match="read only if you name it"):
        MaskDataset("s3://training/out")
    dataset = MaskDataset("s3://training/out", [url])
    assert sorted(numbers(dataset)) == [0, 1, 2]
    assert all(sample["shard"] == url for sample in dataset)
    with pytest.raises(UserError, match="forkserver"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_started_anew_read_from_an_object_store(tmp_path, only_loopback, store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    store.put("workers", b"")
    for number, items in enumerate(plain_plans([3, 4])):
        path = write_tar(tmp_path / "a.tar", [member for item in items for member in members_of(item)])
        store.put(f"workers/data/{number}.tar", path.read_bytes())
    url = "s3://workers/data/{0,1}.tar"
    shards = begin_job([url], "s3://workers/out")
    for shard, items in zip(shards, plain_plans([3, 4]), strict=True):
        annotate("s3://workers/out", shard, [rows_of(item, index) for index, item in enumerate(items)])
    dataset = MaskDataset("s3://workers/out", ["s3://workers/data/*.tar"])
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=2,
        multiprocessing_context="forkserver",
        persistent_workers=True,
    )
    orders = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        orders.append(numbers(loader))
        assert sorted(orders[-1]) == list(range(7))
        assert dataset.counts().joined == 7
    assert len(set(map(tuple, orders))) > 1


def test_pictures_encode_their_numbers():
    for number in (0, 5, 300, 399):
        assert number_of(torch.from_numpy(picture(number)).permute(2, 0, 1)) == number
    assert storage is joining.storage

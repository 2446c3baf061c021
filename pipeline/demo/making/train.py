"""Train the demo model from image-caption pairs alone, and export it: `python -m pipeline.demo.making.train`.

It goes on from the weights of a first training, which knew things alone, and teaches stuff as well: about
an hour of one core. `--from-scratch` runs the first training instead: five minutes on a GPU with 16 cores to
render beside it. `--scale` shortens either. Steps are scheduled and all is seeded, so load changes only the
time taken. An interrupted run goes on from its last checkpoint. No mask is ever rendered here: masks are what
is evaluated later.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from pipeline.demo.assets import demo_model_config_path, demo_weights_path, write_checksums
from pipeline.demo.making.art import (
    TEXTURES_PER_CLASS,
    TRAIN_ARTISTS,
    TRAIN_PHOTOS,
    ArtBox,
    load_art,
    with_stuff,
)
from pipeline.demo.making.batches import Batch, StepBatches
from pipeline.demo.making.curriculum import FULL_PLAN, STUFF_PLAN, Phase, Plan, scaled, schedule
from pipeline.demo.making.losses import caption_relations, decorrelation_loss, multi_positive_loss
from pipeline.demo.making.scenes import SpriteMips
from pipeline.demo.making.vocabulary import UNKNOWN_ROW, CompactVocabulary

CPU = torch.device("cpu")
# What the first training came to (FULL_PLAN, things alone): 819,000 scenes.
FIRST_WEIGHTS = Path(__file__).parents[3] / "tests/bench/weights/legrad_demo_clip-1.safetensors"
FIRST_WEIGHTS_SHA256 = "ada1843379f478af64886ca1732c39ca05d1c475e9a3240acdb30adad1acd3d1"

_WORD_TABLE = "token_embedding.weight"


def build_model(vocabulary: CompactVocabulary) -> open_clip.CLIP:
    """Return the untrained demo model with a compact token table."""
    config = json.loads(demo_model_config_path().read_text(encoding="utf-8"))
    text_config = {**config["text_cfg"], "vocab_size": vocabulary.size}
    model = open_clip.CLIP(
        config["embed_dim"], config["vision_cfg"], text_config, init_logit_scale=math.log(10)
    )
    with torch.no_grad():
        model.token_embedding.weight[UNKNOWN_ROW] = 0
    return model


def batch_loss(
    model: open_clip.CLIP, batch: Batch, window: tuple[int, int], plan: Plan
) -> tuple[Tensor, float]:
    """Return the loss of a batch, and the share of images whose most similar concept is in the image."""
    # Plain products are a quarter faster here than the fused kernel, which suits longer sequences.
    with torch.autocast(batch.images.device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        image_features = encode_window(model.visual, batch.images, window)
        text_features = model.encode_text(torch.cat([batch.concept_rows, batch.caption_rows]))
    unit_images, unit_texts = (
        F.normalize(image_features.float(), dim=-1),
        F.normalize(text_features.float(), dim=-1),
    )
    unit_concepts, unit_captions = unit_texts.tensor_split([len(batch.concept_rows)])
    scale = model.logit_scale.exp().clamp(max=100)
    concept_logits = scale * unit_images @ unit_concepts.T
    same, ignored = caption_relations(batch.labels, batch.caption_labels)
    loss = (
        multi_positive_loss(concept_logits, batch.labels)
        + multi_positive_loss(scale * unit_images @ unit_captions.T, same, ignored)
        + plan.decorrelation_weight * decorrelation_loss(unit_concepts)
    )
    top1 = batch.labels.gather(1, concept_logits.argmax(dim=1, keepdim=True)).mean().item()
    return loss, top1


def encode_window(visual: VisionTransformer, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Encode images no larger than the model's, with a window of its position grid, not an interpolated one.

    Args:
        visual: open_clip's VisionTransformer.
        images: Normalised, square [batch, 3, side, side].
        window: First row and column of the window in the grid of positions.
    """
    grid_side = images.shape[-1] // visual.patch_size[0]
    rows = torch.arange(window[0], window[0] + grid_side)[:, None] * visual.grid_size[1]
    patches = (rows + torch.arange(window[1], window[1] + grid_side)).flatten() + 1
    positions = visual.positional_embedding[torch.cat([torch.zeros(1, dtype=torch.int64), patches])]
    features: Tensor = torch.func.functional_call(visual, {"positional_embedding": positions}, (images,))
    return features


def make_optimizer(model: open_clip.CLIP, plan: Plan) -> torch.optim.AdamW:
    """Return AdamW with decay on matrices alone and a doubled rate for the text tower."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_text, is_decayed = not name.startswith("visual."), parameter.ndim >= 2 and "embedding" not in name
        groups.setdefault((is_text, is_decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "weight_decay": plan.weight_decay * is_decayed,
                "rate": 2.0 if is_text else 1.0,
            }
            for (is_text, is_decayed), members in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


@dataclass
class Training:
    """The state of a run between steps, which a checkpoint contains."""

    model: open_clip.CLIP
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    next_step: int = 0

    def save(self, path: Path, plan: Plan) -> None:
        """Write a checkpoint; an older one is replaced atomically."""
        state = {
            "plan": json.dumps(asdict(plan)),
            "next_step": self.next_step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def restore(self, path: Path, plan: Plan) -> None:
        """Resume from a checkpoint, if there is one of the same plan."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=self.model.logit_scale.device)
        if state["plan"] != json.dumps(asdict(plan)):
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.next_step = state["average"], state["next_step"]


def start_training(plan: Plan, vocabulary: CompactVocabulary, device: torch.device) -> Training:
    """Return a model as a plan starts with it, and its optimizer, equal in every process."""
    torch.manual_seed(plan.seed)
    model = build_model(vocabulary)
    if plan.is_warm_start:
        untrained = {name: parameter.detach() for name, parameter in model.named_parameters()}
        model.load_state_dict(mixed(untrained, vocabulary, 1.0), strict=False)
    model = model.to(device)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Training(model, average, make_optimizer(model, plan))


def read_first_weights(vocabulary: CompactVocabulary) -> dict[str, Tensor]:
    """Return the weights of the first training in fp32, with a compact token table; words new since are zero.

    Raises:
        ValueError: The file of the weights is another.
    """
    digest = hashlib.sha256(FIRST_WEIGHTS.read_bytes()).hexdigest()
    if digest != FIRST_WEIGHTS_SHA256:
        raise ValueError(f"{FIRST_WEIGHTS} has SHA-256 {digest}; expected {FIRST_WEIGHTS_SHA256}")
    weights = {name: weight.float() for name, weight in load_file(FIRST_WEIGHTS).items()}
    weights[_WORD_TABLE] = vocabulary.compact(weights[_WORD_TABLE])
    return weights


def mixed(
    weights: Mapping[str, Tensor], vocabulary: CompactVocabulary, first_share: float
) -> dict[str, Tensor]:
    """Return weights moved towards those of the first training, which know no newer words.

    Args:
        weights: With a compact token table.
        vocabulary: Of that table.
        first_share: Share of the first weights, 0 to 1.
    """
    first = read_first_weights(vocabulary)
    found = {name: weight.lerp(first[name], first_share) for name, weight in weights.items()}
    is_new = first[_WORD_TABLE].abs().sum(dim=1, keepdim=True) == 0
    found[_WORD_TABLE] = torch.where(is_new, weights[_WORD_TABLE], found[_WORD_TABLE])
    return found


def train_step(
    training: Training, batch: Batch, window: tuple[int, int], learning_rate: float, plan: Plan
) -> tuple[float, float]:
    """One optimizer step on the mean gradient of all processes; return the loss and top-1 of this process."""
    parameters = list(training.model.parameters())
    loss, top1 = batch_loss(training.model, batch, window, plan)
    gradients = torch.autograd.grad(loss, parameters)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    flat *= (1.0 / flat.norm()).clamp(max=1.0)
    ends = np.cumsum([parameter.numel() for parameter in parameters])[:-1].tolist()
    for parameter, gradient in zip(parameters, flat.tensor_split(ends), strict=True):
        parameter.grad = gradient.view_as(parameter)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
    training.optimizer.step()
    training.optimizer.zero_grad()
    with torch.no_grad():
        training.model.token_embedding.weight[UNKNOWN_ROW] = 0
        decay = min(plan.average_decay, (1 + training.next_step) / (10 + training.next_step))
        for name, parameter in training.model.named_parameters():
            training.average[name].lerp_(parameter, 1 - decay)
    return loss.item(), top1


def train(
    plan: Plan,
    art: ArtBox,
    checkpoint: Path,
    *,
    rank: int = 0,
    device: torch.device = CPU,
    render_workers: int = 0,
    checkpoint_every: int = 200,
    report: Callable[[str], None] = print,
) -> Training:
    """Run the remaining steps of the plan in this process.

    Args:
        plan: Decides the result, together with the art.
        art: Sprites and photos of the training.
        checkpoint: Where rank 0 writes, also at the end, and every rank goes on from.
        rank: Of this process; scenes differ from rank to rank.
        device: Where the model is trained.
        render_workers: Processes that render ahead; 0 renders in this one.
        checkpoint_every: In steps.
        report: Takes lines on the progress, from rank 0.
    """
    vocabulary = CompactVocabulary(
        json.loads(demo_model_config_path().read_text())["text_cfg"]["context_length"]
    )
    training = start_training(plan, vocabulary, device)
    training.restore(checkpoint, plan)
    visual = training.model.visual
    batches = StepBatches(
        plan, rank, SpriteMips(art), art, vocabulary, visual.grid_size[0], visual.patch_size[0]
    )
    steps_left = range(training.next_step, plan.total_steps)
    loader = DataLoader(batches, batch_size=None, sampler=steps_left, num_workers=render_workers)
    meter = _Meter(plan, report if rank == 0 else _silent)
    remaining = itertools.islice(schedule(plan), training.next_step, None)
    for (step, phase, learning_rate), (batch, window) in zip(remaining, loader, strict=True):
        loss, top1 = train_step(training, batch.to(device), window, learning_rate, plan)
        training.next_step = step + 1
        meter.add(step, phase, loss, top1)
        if rank == 0 and (
            training.next_step % checkpoint_every == 0 or training.next_step == plan.total_steps
        ):
            training.save(checkpoint, plan)
    return training


class _Meter:
    def __init__(self, plan: Plan, report: Callable[[str], None]) -> None:
        self._plan, self._report = plan, report
        self._losses: list[float] = []
        self._top1s: list[float] = []
        self._started_s = time.monotonic()
        self._images = 0

    def add(self, step: int, phase: Phase, loss: float, top1: float) -> None:
        self._losses.append(loss)
        self._top1s.append(top1)
        self._images += phase.batch_size * self._plan.processes
        if (step + 1) % 50 == 0 or step + 1 == self._plan.total_steps:
            rate = self._images / (time.monotonic() - self._started_s)
            self._report(
                f"step {step + 1}/{self._plan.total_steps}  {phase.image_side} px  "
                f"loss {np.mean(self._losses):.3f}  top-1 {np.mean(self._top1s):.3f}  {rate:.0f} images/s"
            )
            self._losses, self._top1s, self._images, self._started_s = [], [], 0, time.monotonic()


def _silent(_: str) -> None:
    return None


def export(checkpoint: Path, weights_path: Path) -> None:
    """Write the averaged weights of a checkpoint for open_clip: full token table, fp16, safetensors.

    Those of a warm start are mixed with the weights that it started from.
    """
    state = torch.load(checkpoint, weights_only=True, map_location=CPU)
    config = json.loads(demo_model_config_path().read_text(encoding="utf-8"))
    vocabulary = CompactVocabulary(config["text_cfg"]["context_length"])
    weights, plan = dict(state["average"]), json.loads(state["plan"])
    if plan["is_warm_start"]:
        weights = mixed(weights, vocabulary, plan["exported_first_share"])
    weights[_WORD_TABLE] = vocabulary.expand(weights[_WORD_TABLE])
    save_file({name: weight.half().contiguous() for name, weight in sorted(weights.items())}, weights_path)


def training_art(cache_dir: Path, plan: Plan) -> ArtBox:
    """Return the sprites, photos and textures that a plan trains on."""
    art = load_art(cache_dir, TRAIN_ARTISTS, TRAIN_PHOTOS)
    if not plan.shows_stuff:
        return art
    return with_stuff(art, per_class=TEXTURES_PER_CLASS, seed=plan.seed, is_heldout=False)


def _train_process(rank: int, plan: Plan, cache_dir: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    # Else the attention's plain products run in fp32 after all; the switch holds for the CPU too.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    rendezvous = checkpoint.with_name("rendezvous")
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous.resolve()}", rank=rank, world_size=plan.processes
    )
    art = training_art(cache_dir, plan)
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    render_workers = max(0, len(os.sched_getaffinity(0)) // plan.processes - 1)
    train(
        plan,
        art,
        checkpoint,
        rank=rank,
        device=device,
        render_workers=render_workers,
        report=_report_flushed,
    )
    dist.barrier()
    dist.destroy_process_group()


def _report_flushed(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def main() -> None:
    """Fetch the art, train, export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the full schedule's steps (default 1)"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="run the first training, which knows things alone, instead of going on from its weights",
    )
    parser.add_argument("--seed", type=int, default=FULL_PLAN.seed)
    parser.add_argument(
        "--art", type=Path, default=Path(".cache/demo-art"), help="folder for the fetched packages"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/demo-train"), help="folder for the checkpoint"
    )
    parser.add_argument("--out", type=Path, default=demo_weights_path(), help="weights to write")
    parser.add_argument(
        "--export-only", action="store_true", help="export the last checkpoint without training"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.work / "checkpoint.pt"
    if not options.export_only:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        load_art(options.art, TRAIN_ARTISTS, TRAIN_PHOTOS)
        chosen = FULL_PLAN if options.from_scratch else STUFF_PLAN
        plan = scaled(replace(chosen, seed=options.seed), options.scale)
        (options.work / "rendezvous").unlink(missing_ok=True)
        arguments = (plan, options.art, checkpoint)
        spawn(_train_process, arguments, nprocs=plan.processes)  # type: ignore[no-untyped-call]
    export(checkpoint, options.out)
    if options.out == demo_weights_path():
        write_checksums()
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

"""What the text tower costs: maps/s from captions, each unique, beside maps/s from embeddings.

    python tests/bench/text_throughput.py [--model demo | ViT-B-16] [--images 32] [--rounds 5]

Captions are of random words, 3 to 30 of them (mean about 10, as in web corpora). Texts/s, of the same
captions: `whole`: in order, whole contexts, in batches; `single`: the same one by one; `cut`: in order,
batches cut at their longest text; `sorted_cut`: all sorted by length first, as `legrad.text` does; the
number is the batch. Maps/s: batches of images with one prompt each, in memory; from embeddings, from captions
by `TextEmbedder`, and from captions by `whole`. Rounds alternate after one warm-up of each; medians.
ViT-B-16 has seeded weights. Prints one JSON row.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable

import open_clip
import torch
from torch.nn import functional as F

import legrad
from legrad.text import embed_tokens
from legrad.text_cache import TextEmbedder
from pipeline.annotate.model import DEMO, load_explainer
from pipeline.config.schema import ModelConfig
from pipeline.demo import assets
from pipeline.output.records import installed_versions

LAYERS = 2


def made_explainer(model: str, device: str, precision: str) -> legrad.LeGrad:
    if model == DEMO:
        settings = ModelConfig(
            name=assets.DEMO_MODEL_NAME, pretrained=DEMO, precision=precision, layers=LAYERS
        )
        return load_explainer(settings, device)
    torch.manual_seed(0)
    return legrad.LeGrad.from_open_clip(model, device=device, precision=precision, layers=LAYERS)


def made_captions(count: int) -> list[str]:
    draw = random.Random(0)
    words = open_clip.IMAGENET_CLASSNAMES
    lengths = [min(30, max(3, round(draw.lognormvariate(2.2, 0.45)))) for _ in range(count)]
    return [" ".join(draw.choice(words).split()[0] for _ in range(length)) for length in lengths]


def whole(explainer: legrad.LeGrad, captions: list[str], batch: int) -> torch.Tensor:
    """Every caption with its whole context, in order."""
    rows = []
    with torch.no_grad():
        for start in range(0, len(captions), batch):
            tokens = explainer.tokenizer(captions[start : start + batch]).to(explainer.device)
            rows.append(F.normalize(explainer.model.encode_text(tokens).float(), dim=-1))
    return torch.cat(rows)


def cut(explainer: legrad.LeGrad, captions: list[str], batch: int) -> torch.Tensor:
    """In order, each batch cut at its longest caption."""
    parts = [captions[start : start + batch] for start in range(0, len(captions), batch)]
    rows = [embed_tokens(explainer.model, explainer.tokenizer(part), explainer.device) for part in parts]
    return torch.cat(rows)


def sorted_cut(explainer: legrad.LeGrad, captions: list[str], batch: int) -> torch.Tensor:
    return embed_tokens(explainer.model, explainer.tokenizer(captions), explainer.device, batch)


def maps(
    explainer: legrad.LeGrad, images: torch.Tensor, batch: int, embed: Callable[[int], torch.Tensor]
) -> None:
    for start in range(0, len(images), batch):
        trace = explainer.encode(images[start : start + batch])
        rows = embed(start)
        explainer.relevance(trace, rows, torch.arange(len(rows), device=explainer.device))


def seconds(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def text_runs(
    explainer: legrad.LeGrad, captions: list[str], batches: list[int]
) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {"single": lambda: whole(explainer, captions[: batches[0]], 1)}
    for batch in batches:
        for embed in (whole, cut, sorted_cut):
            runs[f"{embed.__name__}_{batch}"] = lambda embed=embed, batch=batch: embed(
                explainer, captions, batch
            )
    return runs


def map_runs(
    explainer: legrad.LeGrad, captions: list[str], image_count: int, batch: int
) -> dict[str, Callable[[], object]]:
    captions = captions[:image_count]
    size = (explainer.transform.height, explainer.transform.width)
    images = torch.randn(image_count, 3, *size, device=explainer.device).to(explainer.dtype)
    rows = whole(explainer, captions, batch)

    def from_captions() -> None:
        embedder = TextEmbedder(explainer)
        maps(
            explainer, images, batch, lambda start: embedder.embed(captions[start : start + batch]).unit_rows
        )

    return {
        "embeddings": lambda: maps(explainer, images, batch, lambda start: rows[start : start + batch]),
        "captions": from_captions,
        "captions_whole": lambda: maps(
            explainer, images, batch, lambda start: whole(explainer, captions[start : start + batch], batch)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO, help="demo, or an open_clip name, with seeded weights")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--text-batches", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="images a batch, one caption each")
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    explainer = made_explainer(settings.model, device, settings.precision)
    captions = made_captions(max(settings.captions, settings.images))
    texts = text_runs(explainer, captions[: settings.captions], settings.text_batches)
    runs = texts | map_runs(explainer, captions, settings.images, settings.batch)
    timings: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(settings.rounds + 1):
        for name, run in runs.items():
            elapsed_s = seconds(run)
            if round_number:
                timings[name].append(elapsed_s)
    counts = dict.fromkeys(runs, settings.images) | dict.fromkeys(texts, settings.captions)
    counts["single"] = settings.text_batches[0]
    rates = {name: counts[name] / statistics.median(times) for name, times in timings.items()}
    tokens = explainer.tokenizer(captions)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    print(
        json.dumps(
            {
                "commit": commit,
                "device": torch.cuda.get_device_name() if device == "cuda" else device,
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "versions": installed_versions(),
                **vars(settings),
                "image_size": [explainer.transform.height, explainer.transform.width],
                "layers": LAYERS,
                "context": tokens.shape[1],
                "tokens_mean": round(float((tokens != 0).sum(dim=1).float().mean()), 1),
                "texts_per_s": {name: round(rates[name], 1) for name in texts},
                "maps_per_s": {name: round(rates[name], 2) for name in runs if name not in texts},
            }
        )
    )


if __name__ == "__main__":
    main()

"""What the text tower costs: maps/s from captions, each unique, beside maps/s from embeddings.

    python tests/bench/text_throughput.py [--model demo | ViT-B-16] [--images 32] [--rounds 5] [--write]

Captions are of random words, 3 to 30 of them (mean about 10, as in web corpora). Texts/s, of the same
captions: `whole`: in order, whole contexts, in batches; `single`: the same one by one; `cut`: in order,
batches cut at their longest text; `sorted_cut`: all sorted by length first, as `legrad.text` does; the
number is the batch. Maps/s: batches of images with one prompt each, in memory; from embeddings, from captions
by `TextEmbedder`, and from captions by `whole`. Rounds alternate after one warm-up of each; medians.
ViT-B-16 has seeded weights. Prints one JSON row a way.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import torch
from demo_inputs import demo_files
from published import figure_parser, recording
from torch.nn import functional as F

import legrad
from legrad.text import embed_tokens
from legrad.text_cache import TextEmbedder
from pipeline.annotate.model import load_explainer
from pipeline.config.schema import DEMO, ModelConfig
from pipeline.demo import assets

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
    """Measure all ways in turn."""
    arguments = options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    explainer = made_explainer(arguments.model, device, arguments.precision)
    captions = made_captions(max(arguments.captions, arguments.images))
    data = demo_files() if arguments.model == DEMO else []
    with recording(__file__, arguments, data=data) as record:
        tokens = explainer.tokenizer(captions)
        lengths = (tokens != 0).sum(dim=1).float()
        record("captions", {"context": tokens.shape[1], "tokens_mean": lengths.mean()})
        for row in rate_rows(explainer, captions, arguments):
            record("rates", row)


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--model", default=DEMO, help="demo, or an open_clip name, with seeded weights")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--text-batches", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="images a batch, one caption each")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def rate_rows(
    explainer: legrad.LeGrad, captions: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the rate of each way; rounds alternate, after a warm-up of each."""
    texts = text_runs(explainer, captions[: arguments.captions], arguments.text_batches)
    maps_of = map_runs(explainer, captions, arguments.images, arguments.batch)
    runs = texts | maps_of
    timings: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds + 1):
        for name, run in runs.items():
            timings[name].append(seconds(run))
    counts = dict.fromkeys(maps_of, arguments.images) | dict.fromkeys(texts, arguments.captions)
    counts["single"] = arguments.text_batches[0]
    for name, times in timings.items():
        unit = "texts" if name in texts else "maps"
        yield {"way": name, "unit": unit, "per_s": counts[name] / statistics.median(times[1:])}


if __name__ == "__main__":
    main()

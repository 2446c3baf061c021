"""On a CUDA device: what a prompt costs over the forward pass, and what the kernel gains over its fallback.

    python tests/bench/explain_gpu.py [--model ViT-B-16] [--batches 64 256] [--precision bf16] [--write]

Prints one JSON row a measurement as soon as it is known; about a minute. Times are medians of runs between
device events. A failed measurement is a row with its error, and the others go on.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from published import figure_parser, recording

sys.path.insert(0, str(Path(__file__).parents[2]))
import legrad
from legrad.method import kernels, kernels_triton

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# precision, prompts, images, tokens
KERNEL_CASES = (
    ("bf16", 64, 1, 197),
    ("bf16", 64, 64, 197),
    ("bf16", 64, 8, 785),
    ("fp32", 64, 8, 197),
)
# (query_block, key_block, warps, stages); None: the kernel's own choice
KERNEL_SETTINGS = (
    None,
    (64, 64, 4, 4),
    (128, 64, 4, 3),
    (64, 128, 4, 3),
    (128, 128, 8, 3),
    (64, 64, 8, 3),
    (32, 64, 4, 3),
)


def milliseconds(run: Callable[[], object], repeats: int = 20) -> dict[str, float]:
    """Median and quartiles of the device time of one run, after three runs that are not counted."""
    for _ in range(3):
        run()
    events = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    quartiles = statistics.quantiles([start.elapsed_time(end) for start, end in events], n=4)
    return {"median_ms": round(quartiles[1], 4), "quartiles_ms": [round(q, 4) for q in quartiles[::2]]}


def found_or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is measured; an error becomes the row."""
    try:
        return measure()
    except Exception as error:  # one failed measurement must not cost the others
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def matrix_product_rate(dtype: torch.dtype) -> dict[str, Any]:
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    timing = milliseconds(lambda: left @ right)
    return timing | {"tflops": round(2 * size**3 / timing["median_ms"] / 1e9, 1)}


def kernel_case(prompts: int, images: int, dtype: torch.dtype, tokens: int = 197) -> tuple[torch.Tensor, ...]:
    gradients = torch.randn(prompts, tokens, 12, 64, device="cuda", dtype=dtype).transpose(1, 2)
    values = torch.randn(images, 12, tokens, 64, device="cuda", dtype=dtype)[:, :, 1:]
    return gradients, values, torch.arange(prompts, device="cuda") % images


def kernel_against_fallback(prompts: int, images: int, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    case = kernel_case(prompts, images, dtype, tokens)
    gradients, values, image_index = case
    product = torch.einsum("phqd,phkd->phqk", gradients[:2].double(), values[image_index[:2]].double())
    expected = product.relu().sum(dim=(1, 2))
    error = (kernels_triton.rectified_column_sums(*case)[:2] - expected).norm() / expected.norm()
    fallback = milliseconds(lambda: kernels.rectified_column_sums_in_pieces(*case, 2**27), repeats=10)
    timings = {}
    for settings in KERNEL_SETTINGS if dtype != torch.float32 else (None, (32, 32, 4, 2), (64, 32, 4, 2)):
        names = ("query_block", "key_block", "warps", "stages")
        options = dict(zip(names, settings, strict=True)) if settings else {}
        try:
            run = milliseconds(partial(kernels_triton.rectified_column_sums, *case, **options))["median_ms"]
        except Exception as failure:  # too much shared memory, say
            run = type(failure).__name__
        timings["chosen" if settings is None else str(settings)] = run
    return {
        "relative_error": float(error),
        "fallback_ms": fallback["median_ms"],
        "kernel_ms": timings,
        "fallback_over_kernel": round(fallback["median_ms"] / timings["chosen"], 2),
    }


def forward_flops(explainer: legrad.LeGrad, batch: int) -> float:
    """Count operations of patches, projections, MLPs (of four times the width) and attention."""
    grid_height, grid_width = explainer.tower.native_grid
    tokens = grid_height * grid_width + explainer.tower.prefix_tokens
    width = explainer.tower.parameter().shape[0]
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    patches = grid_height * grid_width * 3 * explainer.tower.patch_size**2 * width
    return 2.0 * batch * (len(explainer.tower.blocks) * block + patches)


def over_forward(explainer: legrad.LeGrad, batch: int, prompts: int, tflops: float) -> dict[str, Any]:
    images, texts = model_inputs(explainer, batch, prompts)

    @torch.no_grad()
    def forward() -> None:
        explainer.model.encode_image(images)

    floor = milliseconds(forward)
    floor_peak = peak_mib(forward)
    ours = milliseconds(lambda: explainer.relevance(images, texts))
    ours_peak = peak_mib(lambda: explainer.relevance(images, texts))
    trace = explainer.encode(images)
    parts = {
        "trace_ms": milliseconds(lambda: explainer.encode(images))["median_ms"],
        "relevance_of_trace_ms": milliseconds(lambda: explainer.relevance(trace, texts))["median_ms"],
        "heatmaps_ms": milliseconds(lambda: explainer.heatmaps(images, texts), repeats=5)["median_ms"],
    }
    rate = forward_flops(explainer, batch) / floor["median_ms"] / 1e9
    return {
        "forward": floor,
        "ours": ours,
        **parts,
        "over_forward": round(ours["median_ms"] / floor["median_ms"], 3),
        "forward_tflops": round(rate, 1),
        "share_of_matrix_product_rate": round(rate / tflops, 3),
        "maps_per_s": round(batch * prompts / ours["median_ms"] * 1000, 1),
        "peak_mib": {"forward": floor_peak, "ours": ours_peak},
    }


def peak_mib(run: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**20)


def model_inputs(explainer: legrad.LeGrad, batch: int, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = explainer.transform.height, explainer.transform.width
    images = torch.randn(batch, 3, height, width, device="cuda", dtype=explainer.dtype)
    texts = torch.randn(batch, prompts, explainer.embed_dim, device="cuda")
    return images, torch.nn.functional.normalize(texts, dim=-1)


def device_time_by_kernel(explainer: legrad.LeGrad, batch: int) -> dict[str, Any]:
    """Where a prompt's time goes beyond the forward pass: the longest kernels of `relevance`."""
    images, texts = model_inputs(explainer, batch, 1)
    trace = explainer.encode(images)
    explainer.relevance(trace, texts)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        explainer.relevance(trace, texts)
        torch.cuda.synchronize()
    longest = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:14]
    return {
        "batch": batch,
        "kernels_us": {event.key[:90]: [round(event.device_time_total, 1), event.count] for event in longest},
        "kernels": sum(event.count for event in profile.key_averages() if event.device_time_total > 0),
    }


def main() -> None:
    """Measure the matrix product, the kernel, and the method over a forward pass."""
    parser = figure_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.precision]
    with recording(__file__, arguments, needs="a CUDA device") as record:
        product = found_or_error(lambda: matrix_product_rate(dtype))
        record("matrix_product", product)
        for precision, prompts, images, tokens in KERNEL_CASES:
            case = {"precision": precision, "prompts": prompts, "images": images, "tokens": tokens}
            measure = partial(kernel_against_fallback, prompts, images, DTYPES[precision], tokens)
            record("kernels", case | found_or_error(measure))
        explainer = random_explainer(arguments.model, dtype)
        for batch, prompts in [*((batch, 1) for batch in arguments.batches), (arguments.batches[0], 4)]:
            rate = product.get("tflops", float("nan"))
            measure = partial(over_forward, explainer, batch, prompts, rate)
            record("over_forward", {"batch": batch, "prompts": prompts} | found_or_error(measure))
        measure = partial(device_time_by_kernel, explainer, arguments.batches[0])
        record("profile", found_or_error(measure))


def random_explainer(model: str, dtype: torch.dtype) -> legrad.LeGrad:
    """Return an explainer of a model with random weights on the device."""
    with torch.device("cuda"):
        made = open_clip.create_model(model).to("cuda").to(dtype).eval()
    return legrad.LeGrad(made, layers=2)


if __name__ == "__main__":
    main()

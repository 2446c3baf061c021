"""Layouts of figures on time, memory, agreement of numbers, and faults."""

from __future__ import annotations

from figure_values import Figure, side_by_side
from layout_parts import Region, columns_of, lines_of, sentence, table

EXPLAIN_SPEED = {
    "model, size, batch": "{model}, {image_size} px, {batch}",
    "precision": "{precision}",
    "layers": "{layers}",
    "prompts": "{prompts}",
    "ours, s": "{median_s[ours]:.3g}",
    "forward pass, s": "{median_s[forward]:.3g}",
    "authors, s": "{median_s[authors]:.3g}",
    "authors / ours": "{ratio[authors]:.2f}",
    "torchcam, s": "{median_s[torchcam]:.3g}",
    "GradCAM, s": "{median_s[grad_cam]:.3g}",
    "peak memory, ours / authors / forward, MiB": "{peak_mib[ours]:,.0f} / {peak_mib[authors]:,.0f} / "
    "{peak_mib[forward]:,.0f}",
    "largest difference from the authors' maps": "{largest_difference_from_authors:.1e}",
}
GPU_FORWARD = {
    "batch": "{batch}",
    "prompts an image": "{prompts}",
    "forward alone (image tower)": "{forward[median_ms]:.3g} ms",
    "relevance, forward included": "{ours[median_ms]:.3g} ms",
    "ratio": "{over_forward:.2f}",
    "maps/s": "{maps_per_s:,.0f}",
    "peak, forward / relevance": "{peak_mib[forward]:,} / {peak_mib[ours]:,} MiB",
}
GPU_KERNELS = {
    "precision": "{precision}",
    "prompts": "{prompts}",
    "images": "{images}",
    "tokens": "{tokens}",
    "kernel": "{kernel_ms[chosen]:.3g} ms",
    "in pieces": "{fallback_ms:.3g} ms",
    "ratio": "{fallback_over_kernel:.2f}",
    "relative error of the kernel": "{relative_error:.0e}",
}
GPU_STEPS = {
    "images": "{images}",
    "prompts an image": "{prompts}",
    "refinement": "{refine}",
    "mask threads beside": "{mask_threads}",
    "batches at once": "{batches_at_once}",
    "step": "{step_ms:.1f} ms",
    "maps/s": "{maps_per_s:,.0f}",
    "device busy": "{device_busy_share:.2f}",
}
SCENARIOS = {
    "cluster and job": "{what}",
    "efficiency": "{efficiency:.3f}",
    "good shards given up": "{given_up}",
    "workers started at bad places": "{started_at_bad}",
    "driver, CPU ms a shard": "{driver_ms_a_shard:.2f}",
    "driver busy": "{driver_busy_share:.3f}",
    "duration, simulated": "{duration_s:,.0f} s",
}
SIMULATED_WORKERS = {
    "workers": "{workers:,}",
    "shards": "{shards:,}",
    "seconds a shard": "{shard_s:g}",
    "driver busy": "{driver_busy_share:.3f}",
    "driver, CPU ms a shard": "{driver_ms_a_shard:.2f}",
    "efficiency": "{efficiency:.3f}",
}
HOST_CASES = {
    "images": "{side}",
    "prompts": "{prompts}",
    "cores": "{cores}",
    "sample processes (0: threads)": "{processes}",
    "samples/s": "{samples_per_s:,.0f}",
    "CPU ms a sample": "{cpu_ms_per_sample:.2f}",
    "of these, in the process with the device": "{device_process_cpu_ms_per_sample:.2f}",
    "floor, ms": "{floor_ms_per_sample:.2f}",
    "ratio": "{ratio:.2f}",
}
PROCESS_COSTS = {
    "launcher: imports, once a worker, while the model is loaded": "{launcher_ready_s:.1f} s",
    "start of a sample process, from the fork to its first answer": "{process_start_ms:.0f} ms, "
    "{settings_ms:.0f} of it for the settings",
    "death of one, from the kill to the answer of the next one": "{death_ms:.0f} ms",
    "round trip of an empty task": "{round_trip_us:.0f} us",
    "memory of the launcher": "{launcher[private_mb]:.0f} MB private, "
    "{launcher[proportional_mb]:.0f} MB proportional",
    "memory of a sample process that is new": "{new_process[private_mb]:.0f} MB private, "
    "{new_process[proportional_mb]:.0f} MB proportional",
    "memory of one that has decoded chunks of 32": "{used_process[private_mb]:.0f} MB private, "
    "{used_process[proportional_mb]:.0f} MB proportional",
    "JPEG and caption of a sample, CPU to send / to receive": "{raw_sent_us:.1f} / {raw_received_us:.1f} us",
    "pixels of a sample, CPU to send / to receive": "{pixels_sent_us:.1f} / {pixels_received_us:.1f} us",
}
STEP_PARTS = {
    "part": "{part}",
    "launches": "{launches}",
    "waits of the CPU": "{waits}",
    "MB sent": "{sent_mb:.2f}",
    "MB brought back": "{brought_back_mb:.2f}",
    "GB moved on the device": "{moved_gb:.2f}",
}
RESIZED_MASKS = {
    "images": "{images}",
    "rows": "{rows}",
    "other rows": "{other_rows}",
    "mask IoU, mean": "{iou_mean:.4f}",
    "1st percentile": "{iou_1st_percentile:.4f}",
    "least": "{iou_min:.4f}",
    "heat maps' correlation, mean": "{heatmap_correlation_mean:.5f}",
    "least ": "{heatmap_correlation_min:.5f}",
}
RESIZED_PIXELS = {
    "size": "{size}",
    "file": "{file_kb:.0f} kB",
    "levels of 255, mean": "{levels_mean:.3f}",
    "at most": "{levels_max}",
    "exact, ms of CPU": "{exact_ms:.2f}",
    "fast, ms of CPU": "{fast_ms:.2f}",
}
STATUS = {
    "folder": "{where}",
    "shards": "{shards:,}",
    "without a cache": "{without_cache[wall_s]:.2f} s",
    "cached": "{cached[wall_s]:.2f} s",
    "compacted": "{compacted[wall_s]:.2f} s",
    "CPU of the process": "{without_cache[cpu_s]:.2f} / {cached[cpu_s]:.2f} / {compacted[cpu_s]:.2f} s",
}
IN_FLIGHT = {
    "shards in flight, at most": "{in_flight}",
    "device busy": "{busy_share:.2f}",
    "full batches alone would take": "{useful_share:.2f}",
    "shards begun, mean": "{shards_begun:.1f}",
}
ROWS_CASES = {
    "way": "{case}",
    "rows": "{rows}",
    "other rows": "{other_rows}",
    "similarity, at most": "{similarity:.1e}",
    "peak, at most, relative": "{peak:.1e}",
    "equal masks": "{equal_masks:.0%}",
    "smallest IoU": "{smallest_iou:.4f}",
    "masks with an IoU below .99": "{beyond}",
}
PRECISIONS = {
    "model": "{model}",
    "family": "{bf16[family]}",
    "prompts": "{bf16[prompts]}",
    "bf16: relative error": "{bf16[relative_error]:.1e}",
    "correlation": "{bf16[correlation]:.4f}",
    "mask IoU": "{bf16[mask_iou]:.3f}",
    "fp16: relative error": "{fp16[relative_error]:.1e}",
    "correlation ": "{fp16[correlation]:.4f}",
    "mask IoU ": "{fp16[mask_iou]:.3f}",
}
REFINED_MAPS = {
    "set": "`{set}`",
    "kernel": "{kernel}",
    "maps": "{maps}",
    "largest difference": "{largest_difference:.1e}",
    "mean difference": "{mean_difference:.1e}",
    "mask IoU, mean": "{mask_iou:.4f}",
    "smallest": "{smallest_mask_iou:.4f}",
    "equal masks": "{equal_masks:.0%}",
}
REFINED_GROUPS = {
    "images, maps each, frame": "{images}, {maps_an_image}, {side} x {side}",
    "groups of 256 MiB": "{large_groups_ms_an_image:.1f} ms",
    "that fit into a cache": "{small_groups_ms_an_image:.1f} ms",
}
RECIPES = {
    "prompts": "{recipe}",
    "maps an image": "{maps_an_image:.2f}",
    "CPU ms an image": "{cpu_ms_an_image:.1f}",
    "elapsed ms an image": "{wall_ms_an_image:.1f}",
}
RATES = {"way": "{way}", "per second": "{per_s:,.1f} {unit}"}
REMASK = {
    "masks.refine": "{refine}",
    "`annotate`": "{annotate_samples_per_s:.1f} samples/s",
    "`remask`": "{remask_samples_per_s:.1f} samples/s",
    "`remask` over `annotate`": "{ratio:.1f}",
}
FIRST_PATH = {"step": "{step}", "seconds": "{seconds:.1f}", "what the command printed": "{outcome}"}
THROUGHPUT = {
    "samples": "{samples:,}",
    "prompts": "{prompts:,}",
    "bare engine": "{engine_samples_per_s:.0f} samples/s",
    "annotator": "{annotator_samples_per_s:.0f} samples/s",
    "annotator over engine": "{annotator_over_engine:.2f}",
}
SHARD_SIZES = {
    "samples in the shard": "{samples:,}",
    "peak memory": "{peak_mib:,.0f} MiB",
    "MiB of these before the shard": "{before_mib:,.0f}",
}
DRIVER = {
    "shards": "{shards:,}",
    "workers": "{workers}",
    "CPU ms a shard": "{driver_cpu_ms_a_shard:.2f}",
    "elapsed ms a shard": "{wall_ms_a_shard:.2f}",
    "memory at a tenth of the shards / at the end": "{rss_mib_by_share_done[0.1]:,.0f} / "
    "{rss_mib_by_share_done[0.99]:,.0f} MiB",
    "listing": "{listing_s:.1f} s",
    "resuming": "{resuming_s:.1f} s",
}
PACKAGES = {
    "revision": "{revision}",
    "package": "{package}",
    "modules": "{modules}",
    "lines": "{lines:,}",
    "units": "{units}",
    "imports between units": "{arrows}",
    "of these upwards": "{arrows_up}",
}
FAULTS = {
    "fault": "{fault}",
    "injected how": "{injected_how}",
    "samples in": "{samples_in}",
    "annotated": "{annotated}",
    "empty": "{empty}",
    "in error": "{in_error}",
    "in shards given up": "{in_failed_shards}",
    "left": "{in_left_shards}",
    "lost": "{lost}",
    "duplicated": "{duplicated}",
}
PARSERS = {
    "parser": "{parser}",
    "inputs": "{inputs}",
    "read": "{read}",
    "refused": "{refused}",
    "crashes": "{crashes}",
    "hangs": "{hangs}",
    "leaks": "{leaks}",
    "wrong pairings": "{wrong_pairings}",
    "slowest, CPU s": "{slowest_cpu_s:.3f}",
}
GOLDEN = {
    "model": "{model}",
    "pixels": "{image_size}",
    "last layers": "{layers}",
    "neutral prompt": "{neutral}",
    "relative error (Frobenius)": "{relative_error:.1e}",
    "largest difference": "{largest_difference:.1e}",
}


def precisions(figure: Figure) -> str:
    """Return a table with the precisions of a model side by side."""
    return table(side_by_side(figure.rows("models"), "model", "precision"), PRECISIONS)


def largest_golden_error(figure: Figure) -> str:
    """Return the largest relative error of the golden cases."""
    return f"{max(row['relative_error'] for row in figure.rows('cases')):.0e}".replace("e-0", "e-")


def one_table(figure: str, name: str, columns: dict[str, str]) -> Region:
    """Return a region of one table."""
    return Region(figure, [columns_of(name, columns)])


REGIONS: dict[str, Region] = {
    "explain": one_table("explain", "cases", EXPLAIN_SPEED),
    "gpu-forward": Region(
        "explain_gpu",
        [
            sentence("A matrix product of 8192 reaches {tflops:.0f} TFLOP/s.", "matrix_product"),
            columns_of("over_forward", GPU_FORWARD),
        ],
    ),
    "gpu-kernels": Region("explain_gpu", [columns_of("kernels", GPU_KERNELS)], has_head=False),
    "gpu-ratio": Region(
        "explain_gpu", [sentence("{over_forward:.2f}", "over_forward", batch=256, prompts=1)], has_head=False
    ),
    "gpu-step": one_table("gpu_step", "steps", GPU_STEPS),
    "annotate-throughput": one_table("annotate_throughput", "rates", THROUGHPUT),
    "remask-speed": one_table("remask_speed", "rates", REMASK),
    "first-path": Region(
        "first_path",
        [columns_of("steps", FIRST_PATH), sentence("{images} images, {seconds:,.0f} s in all.", "total")],
    ),
    "memory-by-shard-size": one_table("memory_by_shard_size", "sizes", SHARD_SIZES),
    "driver-overhead": one_table("driver_overhead", "runs", DRIVER),
    "cluster-simulation": one_table("cluster_simulation", "scenarios", SCENARIOS),
    "driver-simulated-workers": one_table("driver_simulated_workers", "runs", SIMULATED_WORKERS),
    "host-ceiling": one_table("host_ceiling", "cases", HOST_CASES),
    "process-costs": Region("process_costs", [lines_of("costs", PROCESS_COSTS)]),
    "step-counts": one_table("step_counts", "parts", STEP_PARTS),
    "resize-agreement": Region(
        "resize_agreement", [columns_of("masks", RESIZED_MASKS), columns_of("pixels", RESIZED_PIXELS)]
    ),
    "status-of-many-shards": one_table("status_of_many_shards", "folders", STATUS),
    "small-shards": one_table("small_shards", "in_flight", IN_FLIGHT),
    "rows-agreement": one_table("rows_agreement", "cases", ROWS_CASES),
    "precision-agreement": Region("precision_agreement", [precisions]),
    "refine-agreement": one_table("refine_agreement", "maps", REFINED_MAPS),
    "refine-groups": one_table("refine_groups", "cases", REFINED_GROUPS),
    "prompts-cost": Region(
        "prompts_cost",
        [
            columns_of("recipes", RECIPES),
            sentence("Captions searched for {classes} classes: {captions_per_s:,.0f} a second.", "search"),
        ],
    ),
    "text-throughput": one_table("text_throughput", "rates", RATES),
    "import-graph": one_table("import_graph", "packages", PACKAGES),
    "faults": one_table("faults", "faults", FAULTS),
    "fuzzing": one_table("fuzzing", "parsers", PARSERS),
    "golden-agreement": one_table("golden_agreement", "cases", GOLDEN),
    "golden-error": Region("golden_agreement", [largest_golden_error], has_head=False),
}

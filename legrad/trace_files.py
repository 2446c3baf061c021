"""Write traces to files and read them again, for the model that made them.

A file is in the format of safetensors, so that reading it runs no code. It names the vision tower by a
fingerprint of its weights: a trace of another tower, or of other weights, is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from legrad.arguments import kind_of
from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.method.relevance import relevance_grids
from legrad.method.towers import Tower
from legrad.method.trace import LayerTrace, Trace

FORMAT = "legrad trace 1"
# Values of each weight that the fingerprint covers: training changes all values of a weight, and merging too.
SAMPLED_VALUES = 64


def save_trace(explainer: LeGrad, trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace to a file, which `load_trace` reads for an explainer of the same weights.

    Args:
        explainer: the explainer that made the trace.
        trace: the encoded images.
        path: of the file, which is replaced if it exists.

    Raises:
        InputError: the trace was made by another model, or the file cannot be written.

    Example:
        >>> trace = explainer.encode(explainer.preprocess([image]))
        >>> legrad.save_trace(explainer, trace, folder / "panda.safetensors")
        >>> loaded = legrad.load_trace(explainer, folder / "panda.safetensors")
        >>> bool((explainer.relevance(loaded, explainer.embed_text(["a panda"])) > 0).any())
        True
    """
    if not isinstance(trace, Trace):
        raise InputError(f"trace: expected a trace, received {kind_of(trace)}; pass explainer.encode(images)")
    explainer._as_trace(trace)  # raises an error for a trace of another model
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    shared: dict[str, str] = {}  # layers may share a tensor, which a file of safetensors may not
    for name, each in trace.named_tensors():
        if each is not None and id(each) in names:
            shared[name] = names[id(each)]
        elif each is not None:
            names[id(each)] = name
            tensors[name] = each.detach().cpu().contiguous().clone()
    facts = {
        "tower": tower_fingerprint(explainer),
        "pool": trace.pool,
        "grid": [trace.grid_height, trace.grid_width],
        "layers": list(trace.layer_indices),
        "shared": shared,
    }
    try:
        save_file(tensors, path, metadata={"format": FORMAT, "trace": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"trace: cannot write {os.fspath(path)} ({error})") from error


def load_trace(explainer: LeGrad, path: str | os.PathLike[str]) -> Trace:
    """Read a trace that `save_trace` wrote, onto the explainer's device.

    Args:
        explainer: explainer of the model that made the trace, with these weights; its options may be others.
        path: of the file.

    Raises:
        InputError: the file cannot be read, is no trace, or one of another tower or of other weights.

    Example:
        >>> trace = explainer.encode(explainer.preprocess([image]))
        >>> legrad.save_trace(explainer, trace, folder / "trace.safetensors")
        >>> legrad.load_trace(explainer, folder / "trace.safetensors").layer_indices
        (4, 5)
    """
    shown = os.fspath(path)
    if not Path(path).is_file():
        raise InputError(f"trace: there is no file {shown}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"trace: {shown} is no file of save_trace ({error})") from error
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"trace: {shown} is of the format {metadata.get('format')!r}, expected {FORMAT!r}; "
            "encode the images again"
        )
    explainer._follow_changes()
    try:
        facts = json.loads(metadata["trace"])
        is_of_tower = facts["tower"] == tower_fingerprint(explainer)
        trace = _trace_of(explainer.tower, facts, tensors) if is_of_tower else None
    except Exception as error:  # what the pieces of a damaged file raise is of many types
        raise InputError(f"trace: {shown} is damaged ({type(error).__name__}: {error})") from error
    if trace is None:
        raise InputError(
            f"trace: {shown} was made by another vision tower, with other weights or in another precision; "
            "encode the images again"
        )
    return replace(trace.to(explainer.device), structure=explainer._snapshot.identity)


@torch.no_grad()
def tower_fingerprint(explainer: LeGrad) -> str:
    """Return a digest of the structure of a vision tower and of some values of each of its weights."""
    digest = hashlib.sha256(f"{explainer.tower.family} {explainer.tower.patch_size}".encode())
    for part in explainer._snapshot.parts:
        own = (*part.module.named_parameters(recurse=False), *part.module.named_buffers(recurse=False))
        for name, weight in own:
            facts = f"{type(part.module).__qualname__} {name} {list(weight.shape)} {weight.dtype}"
            digest.update(f"\0{facts}".encode())
            digest.update(_sampled(weight.detach().flatten()).numpy().tobytes())
    return digest.hexdigest()


def _sampled(values: Tensor) -> Tensor:
    """Return the bytes of some of many values, evenly spaced."""
    last = max(0, len(values) - 1)
    places = torch.linspace(0, last, SAMPLED_VALUES, dtype=torch.float64).long()
    places = torch.unique_consecutive(places)[: len(values)]
    return values[places.to(values.device)].cpu().view(torch.uint8)


def _trace_of(tower: Tower, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trace:
    """Put a trace together, and explain its first image, which fails if the tensors do not fit the tower."""

    def optional(name: str) -> Tensor | None:
        return tensors.get(facts["shared"].get(name, name))

    def stored(name: str) -> Tensor:
        return tensors[facts["shared"].get(name, name)]

    scoring = {"reference": tower.reference, "model": tower.own, "authors": tower.authors}[facts["pool"]]
    layers = []
    for index in facts["layers"]:
        block = scoring.pooler or tower.blocks[index]
        name = f"layers.{index}"
        layers.append(
            LayerTrace(
                index,
                stored(f"{name}.values"),
                tuple(optional(f"{name}.out_inputs.{place}") for place in range(len(block.out))),
                tuple(optional(f"{name}.mlp_inputs.{place}") for place in range(len(block.mlp))),
                stored(f"{name}.outputs"),
                stored(f"{name}.block_outputs"),
            )
        )
    grid_height, grid_width = map(int, facts["grid"])
    trace = Trace(
        tuple(layers),
        stored("image_features"),
        grid_height,
        grid_width,
        optional("rotary"),
        facts["pool"],
        unit_keys=optional("unit_keys"),
    )
    if any(len(each) != trace.batch_size for name, each in tensors.items() if name != "rotary"):
        raise ValueError("tensors are of different numbers of images")
    first = trace.to(tower.parameter().device).rows(slice(0, 1))
    relevance_grids(
        tower,
        first,
        F.normalize(first.image_features.float(), dim=-1),
        torch.zeros(first.batch_size, dtype=torch.int64, device=first.image_features.device),
        scoring=scoring,
    )
    return trace

"""Count the work that a step would give to a GPU, on a machine that has a CPU alone.

Tensors that are made from a model's weights, or moved to the model's device, are marked, and report a
pretended device; every operation on them is counted:

- launches: one for each operation that is not a view, an allocation or without elements. Triton kernels,
  which a CPU cannot run, are replaced by functions that count as KERNELS lists.
- waits: operations after which the CPU knows a value of the device, and copies that are not asynchronous:
  whatever is not sent from pinned memory with `non_blocking=True`.
- bytes moved: the elements that an operation reads and writes; a gather reads as much as it writes.

An operation that CUDA splits into several kernels (a sort, a convolution in another layout) counts as one.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from math import prod
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from legrad.masks.refine import DEFAULT_MAX_BYTES
from legrad.masks.refine_groups import kernel_cost, map_groups

PRETENDED = torch.device("xpu", 0)
CPU = torch.device("cpu")
# the part of an operation is that of the innermost of these files in its stack
PARTS = {
    "pipeline/annotate/maps.py": "maps",
    "pipeline/annotate/grid_steps.py": "maps",
    "pipeline/annotate/texts.py": "text",
    "legrad/text_cache.py": "text",
    "legrad/text.py": "text",
    "legrad/method/relevance.py": "relevance",
    "legrad/method/trace.py": "image tower",
    "legrad/images.py": "pixels",
    "legrad/inputs.py": "checks",
}
NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
}
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount"),
}
GATHERS = {"index", "index_select", "embedding", "gather"}
OVERWRITES = {"copy_", "zero_", "fill_"}
# Above this the values of a matrix product or an attention do not matter here, and noise stands in for them.
COMPUTED_FLOPS = 2e9
PRODUCTS = {"mm", "addmm", "bmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"}


@dataclass
class Work:
    """What one part of a step gives to a device."""

    launches: int = 0
    waits: int = 0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    moved_bytes: int = 0

    def __add__(self, other):
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def moved_bytes(*tensors):
    """Bytes of the elements of tensors, each element of an expanded one once."""
    return sum(
        tensor.element_size()
        * prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        for tensor in tensors
    )


class DeviceWork:
    """Counts what is done on the pretended device of a model, by part of a step.

    Attributes:
        by_part: work of each part.
        operations: launches of each operation, by part.
    """

    def __init__(self, model):
        self.by_part = defaultdict(Work)
        self.operations = defaultdict(lambda: defaultdict(int))
        self.creates = self.is_paused = False
        self._noise = {}
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.is_on_device = True

    @property
    def total(self):
        return sum(self.by_part.values(), Work())

    @contextmanager
    def counted(self):
        with ExitStack() as stack:
            for target, replacement in KERNELS.items():
                stack.enter_context(mock.patch(target, replacement(self, target)))
            stack.enter_context(_Moves(self))
            stack.enter_context(_Operations(self))
            yield self

    def part(self):
        frame = sys._getframe(1)
        while frame is not None:
            for ending, part in PARTS.items():
                if frame.f_code.co_filename.endswith(ending):
                    return part
            frame = frame.f_back
        return "other"

    def launch(self, name, *tensors, launches=1, nbytes=None, part=None):
        part = part or self.part()
        self.operations[part][name] += launches
        work = self.by_part[part]
        work.launches += launches
        work.moved_bytes += moved_bytes(*tensors) if nbytes is None else nbytes

    def wait(self, name):
        part = self.part()
        self.operations[part][f"wait: {name}"] += 1
        self.by_part[part].waits += 1

    def upload(self, tensor, is_asynchronous):
        self.by_part[self.part()].uploaded_bytes += tensor.nbytes
        self.operations[self.part()]["upload"] += 1
        if not is_asynchronous:
            self.wait("upload")

    def download(self, tensor):
        self.by_part[self.part()].downloaded_bytes += tensor.nbytes
        self.wait("download")

    @contextmanager
    def paused(self):
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def noise(self, like):
        """A tensor of the shape, strides and dtype of another, of seeded noise that is made once."""
        key = (like.numel(), like.dtype)
        if key not in self._noise:
            generator = torch.Generator().manual_seed(0)
            tile = torch.randn(min(like.numel(), 2**20), generator=generator).to(like.dtype)
            self._noise[key] = tile.repeat(-(-like.numel() // len(tile)))[: like.numel()]
        return self._noise[key].clone().as_strided(like.shape, like.stride())


def is_there(tensor):
    return getattr(tensor, "is_on_device", False)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def marked(tree):
    for tensor in tensors_of(tree):
        tensor.is_on_device = True
    return tree


class _Moves(TorchFunctionMode):
    """Sees what Python sees: the device of a tensor, and moves between devices."""

    def __init__(self, work):
        super().__init__()
        self._work = work

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return PRETENDED if is_there(args[0]) else func(*args)
        if func in (Tensor.is_cpu.__get__, Tensor.is_xpu.__get__):
            return is_there(args[0]) == (func == Tensor.is_xpu.__get__)
        devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.cpu or (func is Tensor.to and CPU in devices):
            return self._to_cpu(func, args, kwargs)
        if source is not None and is_there(source) and func in (Tensor.tolist, Tensor.numpy):
            if func is Tensor.numpy:
                raise TypeError("can't convert a tensor of the pretended device to numpy")
            self._work.download(source)
            with self._work.paused():
                return func(*args, **kwargs)
        if PRETENDED in devices:
            return self._to_device(func, args, kwargs, source)
        is_pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if is_pinned:
            result.is_pinned_here = True
        return result

    def _to_cpu(self, func, args, kwargs):
        if not is_there(args[0]):
            return func(*args, **kwargs)
        self._work.download(args[0])
        with self._work.paused():
            copy = func(*args, **kwargs)
            copy = copy.detach().clone()
        copy.is_on_device = False
        return copy

    def _to_device(self, func, args, kwargs, source):
        args, kwargs = tree_map(lambda leaf: CPU if leaf == PRETENDED else leaf, (args, kwargs))
        is_move = func is Tensor.to or func in (torch.tensor, torch.as_tensor)
        if is_move and (source is None or not is_there(source)):
            with self._work.paused():
                result = func(*args, **kwargs)
                result = result.clone() if result is source else result
            is_asynchronous = kwargs.get("non_blocking", False) and getattr(source, "is_pinned_here", False)
            self._work.upload(result, is_asynchronous)
            return marked(result)
        before, self._work.creates = self._work.creates, True
        try:
            return marked(func(*args, **kwargs))
        finally:
            self._work.creates = before


class _Operations(TorchDispatchMode):
    """Sees each operation that a device would run."""

    def __init__(self, work):
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        work, inputs = self._work, tensors_of((args, kwargs))
        counts = not work.is_paused and (work.creates or any(map(is_there, inputs)))
        if not counts:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        result = self._computed(func, name, args, kwargs)
        if name in WAITS or (name == "index" and _has_mask(args[1])) or func is aten.repeat_interleave.Tensor:
            work.wait(name)
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None and not is_there(index):
                    work.upload(index, is_asynchronous=False)
        if name == "_local_scalar_dense":
            return result
        outputs = tensors_of(result)
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not is_view and name not in NO_LAUNCH and any(output.numel() for output in outputs):
            read = outputs if name in GATHERS else inputs[1:] if name in OVERWRITES else inputs
            work.launch(name, *read, *outputs)
        return marked(result)

    def _computed(self, func, name, args, kwargs):
        if name not in PRODUCTS or _flops(name, args) < COMPUTED_FLOPS:
            return func(*args, **kwargs)
        meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return tree_map(
            lambda leaf: self._work.noise(leaf) if isinstance(leaf, Tensor) else leaf,
            func(*meta[0], **meta[1]),
        )


aten = torch.ops.aten


def _has_mask(indices):
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _flops(name, args):
    left, right = (args[1], args[2]) if name == "addmm" else (args[0], args[1])
    if name == "convolution":
        return 2 * left.shape[0] * prod(left.shape[2:]) * right.numel() // prod(right.shape[2:])
    if name in ("mm", "addmm", "bmm"):
        return 2 * left.numel() * right.shape[-1]
    return 4 * left.numel() * right.shape[-2]


def _one_launch(work, target):
    """The kernel reads its arguments once and writes its result; what it computes here is not counted."""
    module, _, name = target.rpartition(".")
    computed = getattr(sys.modules[module], name)

    def kernel(*args, **kwargs):
        with work.paused():
            result = computed(*args, **kwargs)
        work.launch(f"triton: {name}", *tensors_of((args, kwargs)), result)
        return marked(result)

    return kernel


def _refinement(work, _target):
    """Count what `kernel_cost` says of the kernels; maps are returned as they came."""

    def kernels(images, heatmaps, owners, refinement):
        height, width = heatmaps.shape[-2:]
        neighbours = 8 * len(refinement.dilations)
        maps_per_image = torch.bincount(owners, minlength=len(images)).tolist()
        groups = map_groups(maps_per_image, neighbours, height * width, DEFAULT_MAX_BYTES)
        cost = kernel_cost(groups, neighbours, height * width, refinement.iterations, images[0].nbytes)
        work.launch("triton", launches=cost.launches, nbytes=cost.moved_bytes, part="refinement")
        with work.paused():
            return marked(heatmaps.contiguous().clone())

    return kernels


# functions that Triton computes on a GPU, and how each is counted
KERNELS = {
    "legrad.method.relevance.rectified_column_sums": _one_launch,
    "pipeline.annotate.maps.refine_heatmaps": _refinement,
}

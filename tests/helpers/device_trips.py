"""Counts transfers from a device to the CPU, on a machine that has a CPU alone."""

from collections import Counter
from itertools import chain

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# each of these makes the CPU wait for the device
TRIPS = {
    getattr(Tensor, name): name
    for name in ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__")
}


class DeviceTrips(TorchFunctionMode):
    """Pretends that a model is on a device: what is computed from its weights, or moved there, is there too.

    Args:
        model: its parameters and buffers are on the pretended device.

    Attributes:
        trips: how often each operation brought values to the CPU.
    """

    def __init__(self, model):
        super().__init__()
        self.trips = Counter()
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.is_on_device = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_moved = any(isinstance(leaf, torch.device) for leaf in tree_leaves((args, kwargs)))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_there = is_moved or any(getattr(tensor, "is_on_device", False) for tensor in tensors)
        result = func(*args, **kwargs)
        if is_there and func in TRIPS:
            self.trips[TRIPS[func]] += 1
        if func is Tensor.cpu:
            return result.clone()  # not the same object, as it would be where both places are one
        if func is Tensor.to and result is args[0]:
            result = result.clone()
        for tensor in tree_leaves(result) if is_there else ():
            if isinstance(tensor, Tensor):
                tensor.is_on_device = True
        return result

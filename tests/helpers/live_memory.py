"""How much memory tensors take while code runs."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations within the context have made and that are alive.

    Memory within an operation does not count.

    Attributes:
        peak_bytes: the largest number of bytes alive after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._foreign: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self._made:
                self._foreign[storage.cdata] = storage
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self._foreign:
                self._made[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._made.values()))
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

"""Memory of a device: copies to it, and errors where it is exhausted."""

import re

import torch
from torch import Tensor

# What libraries raise as a plain RuntimeError where the allocator of torch raises an OutOfMemoryError. cuDNN
# reports as an internal or unsupported case that it has no memory for its workspace or its code; if memory
# was not the reason, a smaller batch raises the same error again.
_MESSAGES = re.compile(
    r"CUDA error: out of memory"
    r"|MPS backend out of memory"
    r"|CU(BLAS|BLASLT|DNN|SOLVER|SPARSE|FFT)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create"
    r"|CUDNN_STATUS_INTERNAL_ERROR|CUDNN_STATUS_NOT_SUPPORTED|CUDNN_STATUS_NOT_INITIALIZED"
    r"|unable to find an engine to execute this computation"
    r"|Unable to find a valid cuDNN algorithm"
    r"|Triton Error \[(CUDA|HIP)\]: out of memory"
    r"|can't allocate memory: you tried to allocate \d+ bytes"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means, or is likely to mean, that the memory of a device was exhausted.

    A Triton kernel that needs more shared memory than a processor has (`OutOfResources`) is not such an
    error: it fails for a batch of any size.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None
    )


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the CPU to a device; to a GPU without waiting for it, from page-locked memory."""
    if device.type not in ("cuda", "xpu"):
        return values.to(device)
    staged = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return staged.copy_(values).to(device, non_blocking=True)

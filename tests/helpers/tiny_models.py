"""Small CLIP models with random weights in every parameter, norms and biases too."""

from typing import Any

import open_clip
import torch
from torch import Tensor, nn

PATCH, GRID_HEIGHT, GRID_WIDTH, EMBED_DIM, LAYERS = 4, 3, 5, 24, 3
IMAGE_SIZE = (GRID_HEIGHT * PATCH, GRID_WIDTH * PATCH)

VISION: dict[str, Any] = {
    "layers": LAYERS,
    "width": 32,
    "head_width": 8,
    "patch_size": PATCH,
    "image_size": IMAGE_SIZE,
}
# Too few words for open_clip's tokenizer: the tests of texts take more.
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def tiny_clip(
    *, quick_gelu: bool = False, cast_dtype: torch.dtype | None = None, vocab_size: int = 64, **vision: Any
) -> nn.Module:
    """A CLIP on 12 x 20 pixels, patches of 4: 3 x 5 patches; `vision` overrides its vision configuration."""
    text = TEXT | {"vocab_size": vocab_size}
    model = open_clip.CLIP(EMBED_DIM, VISION | vision, text, quick_gelu=quick_gelu, cast_dtype=cast_dtype)
    return fill(model).eval()


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter: those called `weight` of one dimension around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        around_one = parameter.ndim == 1 and name.endswith("weight")
        spread = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.data = noise * spread + int(around_one)
    return model


def tiny_images(
    batch: int = 2, *, size: tuple[int, int] = IMAGE_SIZE, dtype=torch.float32, seed: int = 1
) -> Tensor:
    """Noise at the tiny model's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator).to(dtype)


def unit_texts(*leading: int, dtype=torch.float32, seed: int = 2) -> Tensor:
    """Random unit rows in the tiny model's joint space."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*leading, EMBED_DIM, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1).to(dtype)


def relative_error(received: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, over that of what was expected."""
    difference = received.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())

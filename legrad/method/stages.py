"""Stages: the operations between the attention and the score, each with its forward pass and its pullback.

A stage acts on each token separately, on all of them alike (`EachToken` alone tells them apart), and has

    is_linear                   True: the pullback needs no inputs, so none are stored for it
    forward(inputs)             tokens [..., in] -> [..., out], in the dtype of the inputs
    pullback(inputs, dtype)     the stage linearised at the inputs [batch, tokens, in] of a batch of images
                                (None if it is linear); matrix products are computed in `dtype`

One pullback maps the gradients of any number of prompts. `rows` selects the image of each prompt: by indices,
or by a slice, which copies nothing, if prompt i belongs to image i or all prompts belong to one image. A
gradient that is the same for all tokens of a prompt has a token axis of length one until a stage makes the
tokens differ. With mean pooling, the first product in the backward pass of an MLP is therefore a vector times
a matrix.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

# quick_gelu(x) = silu(1.702 x) / 1.702, so their derivatives are one.
QUICK_GELU_SLOPE = 1.702

Rows = slice | Tensor
# (output gradients [prompts, 1 or tokens, out], image of each prompt) -> input gradients
Pullback = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Linear:
    """A product with a matrix, and a bias.

    Attributes:
        weight: returns the current matrix [out, in], so that reloaded weights are used.
        bias: returns the current bias [out], or None.
    """

    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]

    is_linear = True

    @classmethod
    def of(cls, module: nn.Linear) -> "Linear":
        """Describe a linear module."""
        return cls(lambda: module.weight, lambda: module.bias)

    def forward(self, inputs: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """Apply the stage."""
        weight, bias = self.weight(), self.bias()
        return F.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))

    def pullback(self, _inputs: Tensor | None, dtype: torch.dtype) -> Pullback:
        """Linearise the stage."""
        weight = self.weight().to(dtype)
        return lambda gradients, _rows: gradients.to(dtype) @ weight


@dataclass(frozen=True)
class Scale:
    """A product with one factor for each channel, such as LayerScale.

    Attributes:
        factor: returns the current factors [width].
    """

    factor: Callable[[], Tensor]

    is_linear = True

    def forward(self, inputs: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Apply the stage."""
        return inputs * self.factor().to(inputs.dtype)

    def pullback(self, _inputs: Tensor | None, _dtype: torch.dtype) -> Pullback:
        """Linearise the stage."""
        return lambda gradients, _rows: gradients * self.factor().to(gradients.dtype)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm with weight and bias.

    Attributes:
        module: the norm.
    """

    module: nn.LayerNorm

    is_linear = False

    def forward(self, inputs: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Apply the stage."""
        norm = self.module
        if torch.promote_types(norm.weight.dtype, inputs.dtype) == norm.weight.dtype:
            normed: Tensor = norm(inputs)
            return normed
        weight, bias = norm.weight.to(inputs.dtype), norm.bias.to(inputs.dtype)
        return F.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)

    def pullback(self, inputs: Tensor | None, _dtype: torch.dtype) -> Pullback:
        """Linearise the stage; torch's kernels keep sums and statistics in float32 at least."""
        tokens = _given(inputs)
        return lambda gradients, rows: _norm_backward(self.module, tokens[rows], gradients)


@dataclass(frozen=True)
class Activation:
    """An elementwise non-linearity.

    Attributes:
        module: the activation; one that may act in place is applied to a copy.
    """

    module: nn.Module

    is_linear = False

    def forward(self, inputs: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Apply the stage."""
        outputs: Tensor = self.module(inputs.clone() if _is_in_place(self.module) else inputs)
        return outputs

    def pullback(self, inputs: Tensor | None, _dtype: torch.dtype) -> Pullback:
        """Linearise the stage."""
        tokens = _given(inputs)
        derivative = functools.cache(lambda: activation_derivative(self.module, tokens))

        def pull(gradients: Tensor, rows: Rows) -> Tensor:
            if not isinstance(rows, slice):
                # Prompts of one image share its derivatives.
                return derivative()[rows].mul_(gradients)
            if len(tokens[rows]) == len(gradients):
                return activation_backward(self.module, tokens[rows], gradients)
            return derivative()[rows] * gradients

        return pull


@dataclass(frozen=True)
class Gate:
    """The product in a gated MLP: activation(first half) * second half (SwiGLU and similar).

    Attributes:
        activation: applied to the first half of the channels.

    Source: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202, section 2.
    """

    activation: nn.Module

    is_linear = False

    def forward(self, inputs: Float[Tensor, "*tokens both"]) -> Float[Tensor, "*tokens half"]:
        """Apply the stage."""
        gate, values = inputs.chunk(2, dim=-1)
        return Activation(self.activation).forward(gate) * values

    def pullback(self, inputs: Tensor | None, _dtype: torch.dtype) -> Pullback:
        """Linearise the stage."""
        gate, values = _given(inputs).chunk(2, dim=-1)
        by_values = Activation(self.activation).forward(gate)
        by_gate = activation_derivative(self.activation, gate) * values
        derivative = torch.stack([by_gate, by_values], dim=-2)

        def pull(gradients: Tensor, rows: Rows) -> Tensor:
            return (derivative[rows] * gradients.unsqueeze(-2)).flatten(-2)

        return pull


@dataclass(frozen=True)
class EachToken:
    """A linear layer of its own for each token, such as the two heads of a distilled classifier.

    Attributes:
        layers: first token to last.
    """

    layers: tuple[Linear, ...]

    is_linear = True

    def forward(self, inputs: Float[Tensor, "batch tokens in"]) -> Float[Tensor, "batch tokens out"]:
        """Apply the stage."""
        by_token = zip(self.layers, inputs.unbind(dim=-2), strict=True)
        return torch.stack([layer.forward(token) for layer, token in by_token], dim=-2)

    def pullback(self, _inputs: Tensor | None, dtype: torch.dtype) -> Pullback:
        """Linearise the stage."""
        pullbacks = [layer.pullback(None, dtype) for layer in self.layers]

        def pull(gradients: Tensor, rows: Rows) -> Tensor:
            by_token = gradients.expand(-1, len(pullbacks), -1).unbind(dim=1)
            return torch.stack(
                [pullback(gradient, rows) for pullback, gradient in zip(pullbacks, by_token, strict=True)],
                dim=1,
            )

        return pull


Stage = Linear | Scale | Norm | Activation | Gate | EachToken


def run_stages(stages: Sequence[Stage], inputs: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Apply stages in order.

    Returns:
        The outputs of the last stage, and the inputs of each stage that is not linear (None for the others).
    """
    kept: list[Tensor | None] = []
    for stage in stages:
        kept.append(None if stage.is_linear else inputs)
        inputs = stage.forward(inputs)
    return inputs, tuple(kept)


def pull_back(stages: Sequence[Stage], kept_inputs: Sequence[Tensor | None], dtype: torch.dtype) -> Pullback:
    """Linearise stages at the inputs that `run_stages` returned, and compose their pullbacks."""
    pullbacks = [stage.pullback(inputs, dtype) for stage, inputs in zip(stages, kept_inputs, strict=True)]

    def pull(gradients: Tensor, rows: Rows) -> Tensor:
        for pullback in reversed(pullbacks):
            gradients = pullback(gradients, rows)
        return gradients

    return pull


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over many terms: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def activation_derivative(activation: nn.Module, inputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Differentiate an elementwise activation at each input."""
    return activation_backward(activation, inputs, inputs.new_ones(()))


def activation_backward(
    activation: nn.Module, inputs: Float[Tensor, "*shape"], gradients: Float[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """Multiply gradients, which expand to the shape of the inputs, by the activation's derivative there."""
    gradients = gradients.to(inputs.dtype).expand_as(inputs)
    if inputs.device.type == "cpu":  # its kernels need contiguous gradients
        gradients, inputs = gradients.contiguous(), inputs.contiguous()
    # These need one pass over memory; autograd would compute the outputs first.
    product: Tensor | None = None
    if type(activation) is nn.GELU:
        product = torch.ops.aten.gelu_backward(gradients, inputs, approximate=activation.approximate)
    elif type(activation) is QuickGELU:
        product = torch.ops.aten.silu_backward(gradients, QUICK_GELU_SLOPE * inputs)
    return _backward_by_autograd(activation, inputs, gradients) if product is None else product


def _backward_by_autograd(
    activation: nn.Module, inputs: Float[Tensor, "*shape"], gradients: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode cannot require gradients, but copies of them can.
        leaf = (inputs.clone() if inputs.is_inference() else inputs.detach()).requires_grad_()
        outputs = activation(leaf * 1 if _is_in_place(activation) else leaf)
        (product,) = torch.autograd.grad(outputs, leaf, gradients)
    return product


def _norm_backward(
    norm: nn.LayerNorm, inputs: Float[Tensor, "images tokens width"], gradients: Tensor
) -> Float[Tensor, "prompts tokens width"]:
    """Multiply gradients [prompts, 1 or tokens, width] by the derivative of a LayerNorm."""
    # With float32 parameters, the CPU kernel also keeps the statistics of narrower inputs in float32.
    parameter_dtype = accumulation_dtype(inputs.dtype) if inputs.device.type == "cpu" else inputs.dtype
    weight, bias = norm.weight.detach().to(parameter_dtype), norm.bias.detach().to(parameter_dtype)
    shape = list(norm.normalized_shape)
    _, mean, inverse_std = torch.native_layer_norm(inputs.contiguous(), shape, weight, bias, norm.eps)
    # The kernel needs operands of one shape: images are expanded to prompts, and gradients to tokens.
    grown = (len(gradients), *inputs.shape[1:])
    by_outputs, inputs = gradients.to(inputs.dtype).expand(grown), inputs.expand(grown)
    mean, inverse_std = (values.expand(*grown[:-1], 1).contiguous() for values in (mean, inverse_std))
    wanted = [True, False, False]
    by_inputs: Tensor = torch.ops.aten.native_layer_norm_backward(
        by_outputs.contiguous(), inputs.contiguous(), shape, mean, inverse_std, weight, bias, wanted
    )[0]
    return by_inputs


def _is_in_place(activation: nn.Module) -> bool:
    """Return whether an activation may overwrite its inputs: only torch's and timm's own say so."""
    is_foreign = type(activation).__module__.partition(".")[0] not in ("torch", "timm", "open_clip")
    return (
        is_foreign or next(activation.children(), None) is not None or bool(getattr(activation, "inplace", 0))
    )


def _given(inputs: Tensor | None) -> Tensor:
    if inputs is None:
        raise ValueError("the pullback of a non-linear stage needs the inputs of the stage")
    return inputs

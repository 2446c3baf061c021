"""Small models of Hugging Face transformers with random weights, their processors, and LeGrad by autograd."""

import math
import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from tests.helpers.tiny_models import EMBED_DIM, LAYERS, PATCH, fill

SIDE = 4 * PATCH
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CONTEXT = 16
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]


def tiny_hf_clip(*, seed: int = 0, text: dict[str, Any] | None = None, **vision: Any) -> CLIPModel:
    """A CLIPModel on 16 x 16 pixels, patches of 4."""
    ids = _clip_ids()
    marks = {"bos_token_id": ids[START], "eos_token_id": ids[END], "pad_token_id": ids[END]}
    config = CLIPConfig(
        text_config={**TEXT, "vocab_size": len(ids), **marks, **(text or {})},
        vision_config=VISION | vision,
        projection_dim=EMBED_DIM,
    )
    return fill(CLIPModel(config), seed).eval()


def tiny_siglip(*, seed: int = 0, **vision: Any) -> SiglipModel:
    """A SiglipModel on 16 x 16 pixels, whose joint space has EMBED_DIM dimensions."""
    width = {"hidden_size": EMBED_DIM}
    config = SiglipConfig(
        text_config=_siglip_text(),
        vision_config=VISION | width | vision,
    )
    return fill(SiglipModel(config), seed).eval()


def tiny_siglip2(*, seed: int = 0, **vision: Any) -> Siglip2Model:
    """A Siglip2Model as of the NaFlex checkpoints, with positions for 4 x 4 patches of 4 pixels."""
    width = {"hidden_size": EMBED_DIM}
    tower = {name: value for name, value in VISION.items() if name != "image_size"}
    config = Siglip2Config(
        text_config=_siglip_text(),
        vision_config=tower | width | {"num_patches": 16} | vision,
    )
    return fill(Siglip2Model(config), seed).eval()


def _clip_ids() -> dict[str, int]:
    return {piece: number for number, piece in enumerate([*LETTERS, START, END])}


def _siglip_text() -> dict[str, Any]:
    sizes = {"hidden_size": EMBED_DIM, "projection_size": EMBED_DIM, "vocab_size": len(_gemma_ids())}
    return TEXT | sizes | SIGLIP_MARKS


SIGLIP_MARKS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def _gemma_ids() -> dict[str, int]:
    return {
        piece: number
        for number, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *string.ascii_lowercase])
    }


def clip_processor(side: int = SIDE) -> CLIPProcessor:
    """A processor for a small CLIPModel: its tokenizer knows single letters."""
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0.4, 0.5, 0.6]
    )
    return CLIPProcessor(images, CLIPTokenizer(_clip_ids(), merges=[], model_max_length=CONTEXT))


def siglip_tokenizer(kind: type = Siglip2Tokenizer) -> Any:
    """A tokenizer of SigLIP 2 for single letters, padded on the right, without a mask of the padding."""
    return kind(
        _gemma_ids(),
        merges=[],
        model_max_length=CONTEXT,
        padding_side="right",
        model_input_names=["input_ids"],
    )


def siglip_processor(side: int = SIDE) -> SiglipProcessor:
    """A processor for a small SiglipModel."""
    return SiglipProcessor(SiglipImageProcessor(size={"height": side, "width": side}), siglip_tokenizer())


def siglip2_processor() -> Siglip2Processor:
    """A processor for a small Siglip2Model."""
    return Siglip2Processor(Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16), siglip_tokenizer())


def save_hf_folder(folder: Path, model: nn.Module, processor: Any) -> Path:
    """Write a model and its processor where `from_pretrained` finds them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def hf_relevance(model: Any, images: Tensor, texts: Tensor, pool: str = "reference") -> Tensor:
    """LeGrad by autograd on attention matrices that are spelled out; shares no code with the package.

    Returns:
        Relevance [layers, batch, prompts, patches], for unit texts [batch, prompts, embed_dim].
    """
    visual, is_clip = model.vision_model, type(model) is CLIPModel
    tokens = _embedded(visual, images)
    tokens = visual.pre_layrnorm(tokens) if is_clip else tokens
    maps = []
    for layer in visual.encoder.layers:
        tokens, attention = _block(layer, tokens)
        if is_clip:
            mean = tokens.mean(dim=1) if pool == "reference" else tokens[:, 0]
            features = model.visual_projection(visual.post_layernorm(mean))
        else:
            normed = tokens if pool == "reference" else visual.post_layernorm(tokens)
            features, attention = _pooled(visual.head, normed)
        unit = nn.functional.normalize(features, dim=-1)
        scores = torch.einsum("bd,bpd->bp", unit, texts)
        maps.append(torch.stack([_rectified(score, attention) for score in scores.unbind(dim=1)], dim=1))
    return torch.stack(maps)[..., int(is_clip) :]


def _embedded(visual: Any, images: Tensor) -> Tensor:
    if type(visual).__name__.startswith("Siglip2"):
        rows, columns = (side // PATCH for side in images.shape[-2:])
        patches = [
            images[:, :, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
            for row in range(rows)
            for column in range(columns)
        ]
        flat = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], dim=1)
        return visual.embeddings(flat, torch.tensor([[rows, columns]] * len(images)))
    return visual.embeddings(images, interpolate_pos_encoding=tuple(images.shape[-2:]) != (SIDE, SIDE))


def _block(layer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    attention, normed = layer.self_attn, layer.layer_norm1(tokens)
    context, matrix = _attend(
        *(projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)),
        attention.num_heads,
    )
    attended = tokens + attention.out_proj(context)
    return attended + layer.mlp(layer.layer_norm2(attended)), matrix


def _pooled(head: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    inputs = (head.probe.expand(len(tokens), -1, -1), tokens, tokens)
    context, matrix = _attend(
        *(given @ weight.T + bias for given, weight, bias in zip(inputs, weights, biases, strict=True)),
        head.attention.num_heads,
    )
    attended = head.attention.out_proj(context)
    return (attended + head.mlp(head.layernorm(attended)))[:, 0], matrix


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    queries, keys, values = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values)
    )
    matrix = torch.softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), dim=-1)
    return (matrix @ values).transpose(1, 2).flatten(2), matrix


def _rectified(scores: Tensor, attention: Tensor) -> Tensor:
    # Images do not mix, so the gradient of the batch's sum holds each image's own.
    (gradient,) = torch.autograd.grad(scores.sum(), attention, retain_graph=True)
    return gradient.relu().mean(dim=(1, 2))

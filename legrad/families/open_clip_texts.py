"""Embed tokens with open_clip's text towers, as cut as possible without changing an embedding."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip import CLIP, CoCa, CustomTextCLIP, transformer
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from legrad.families.modules import GLOBAL_HOOKS, HOOKS
from legrad.families.source import IsCausal, TextEncoder

# The modules of open_clip's text towers, each with its own forward pass.
FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        *(CLIP, TextTransformer, transformer.Transformer, transformer.ResidualAttentionBlock),
        *(transformer.CustomTransformer, transformer.CustomResidualAttentionBlock, transformer.Attention),
        *(nn.MultiheadAttention, NonDynamicallyQuantizableLinear, nn.Linear, nn.Embedding, nn.Dropout),
        *(nn.LayerNorm, transformer.LayerNorm, transformer.LayerNormFp32, transformer.LayerScale),
        *(nn.Sequential, nn.ModuleList, nn.Identity, nn.GELU, transformer.QuickGELU),
    )
}
TOKENIZER = "open_clip.get_tokenizer(model_name)"


def text_encoder_of(model: nn.Module) -> TextEncoder:
    """Return how a model of open_clip embeds the tokens of texts, as it is now.

    Trailing tokens that no embedding depends on may be cut. Towers in which padding affects the result, such
    as SigLIP's, and those that do not compute what their classes define, get all tokens.
    """
    tower: Any = _text_tower(model)
    known_tower = tower if _is_known(model, tower) else None
    return TextEncoder(
        needed_lengths=partial(_needed_lengths, known_tower),
        encode=partial(_encode, model, known_tower),
        context=tower.context_length if isinstance(tower, CLIP | TextTransformer) else None,
        vocabulary=int(getattr(tower, "vocab_size", 0)) or None,
        tokenizer=TOKENIZER,
    )


def _text_tower(model: nn.Module) -> nn.Module:
    """Return the module that contains the text tower: in open_clip's plain CLIP, the model itself."""
    tower = getattr(model, "text", None)
    return tower if isinstance(tower, nn.Module) else model


def _is_known(model: nn.Module, tower: nn.Module) -> bool:
    """Return whether a text tower computes what its class defines, so that its tokens may be cut."""
    if isinstance(tower, HFTextEncoder):  # always called as a whole
        return True
    return (
        type(tower) in (CLIP, TextTransformer)
        and (not isinstance(model, CustomTextCLIP | CoCa) or type(model) in (CustomTextCLIP, CoCa))
        and "encode_text" not in {*vars(model), *vars(tower)}
        and not any(getattr(torch_module, hooks) for hooks in GLOBAL_HOOKS)
        and all(map(_is_as_defined, _parts_of(tower)))
    )


def _parts_of(tower: nn.Module) -> Iterator[nn.Module]:
    """Yield the tower and the modules that texts pass; in open_clip's plain CLIP, the tower is the model."""
    yield tower
    for name, child in tower.named_children():
        if name != "visual":
            yield from child.modules()


def _is_as_defined(module: nn.Module) -> bool:
    """Return whether a module has a known class and `forward`, so that tokens only see earlier tokens."""
    return (
        FORWARDS.get(type(module)) is type(module).forward
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in HOOKS)
    )


def _needed_lengths(
    tower: Any, token_ids: Int[Tensor, "prompts context"], is_causal: IsCausal
) -> Int[Tensor, " prompts"]:
    """Return for each text the number of first tokens that its embedding depends on."""
    everything = torch.full_like(token_ids[:, 0], token_ids.shape[1])
    if isinstance(tower, HFTextEncoder):  # padding is masked, and excluded from averages of tokens
        pad_id = tower.config.pad_token_id
        return everything if pad_id is None else _length_before_padding(token_ids, pad_id)
    if not isinstance(tower, CLIP | TextTransformer):
        return everything
    has_class_token = getattr(tower, "cls_emb", None) is not None
    sees_all = has_class_token and tower.attn_mask is None
    if not sees_all and not is_causal(tower.attn_mask):
        return everything
    if has_class_token:  # as in CoCa: padding is masked
        # The uncorrected mask is shifted by one, so that one padding token is not masked.
        seen_padding = int(not tower.correct_cls_mask)
        return (_length_before_padding(token_ids, tower.pad_id) + seen_padding).minimum(everything)
    pooled_position = _pooled_position(tower, token_ids)
    return everything if pooled_position is None else pooled_position + 1


def _length_before_padding(token_ids: Int[Tensor, "prompts context"], pad_id: int) -> Int[Tensor, " prompts"]:
    """Return the number of tokens up to the last one that is not padding, at least one."""
    positions = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device)
    return (positions * (token_ids != pad_id)).amax(dim=1).clamp(min=1)


def _pooled_position(tower: Any, token_ids: Int[Tensor, "prompts context"]) -> Int[Tensor, " prompts"] | None:
    """Return the position of the token that the tower pools, if it depends on the tokens; otherwise None."""
    is_clip = isinstance(tower, CLIP)
    pool_type = tower.text_pool_type if is_clip else tower.pool_type
    if pool_type == "argmax":
        return token_ids.argmax(dim=1)
    if pool_type != "eos":
        return None
    is_end: Tensor = token_ids == (tower.text_eos_id if is_clip else tower.eos_id)
    return is_end.int().argmax(dim=1)


def _encode(
    model: Any, tower: Any, token_ids: Int[Tensor, "prompts length"], context: int
) -> Float[Tensor, "prompts embed_dim"]:
    # In half precision CoCa's own text tower fails, as its class token stays in float32.
    has_class_token = isinstance(tower, TextTransformer) and tower.cls_emb is not None
    if isinstance(tower, HFTextEncoder) or (token_ids.shape[1] == context and not has_class_token):
        whole: Tensor = model.encode_text(token_ids)
        return whole
    return _encode_cut(tower, token_ids, context)


def _encode_cut(
    tower: Any, token_ids: Int[Tensor, "prompts length"], context: int
) -> Float[Tensor, "prompts embed_dim"]:
    """Embed cut tokens, as open_clip's text transformer, which only takes whole contexts, would.

    Source: `CLIP.encode_text` and `TextTransformer.forward` of open_clip 3.3.
    """
    dtype = tower.transformer.get_cast_dtype()
    length = token_ids.shape[1]
    positions = tower.positional_embedding.to(dtype)
    x = tower.token_embedding(token_ids).to(dtype) + positions[:length]
    mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
    if getattr(tower, "cls_emb", None) is None:
        pooled_position = _pooled_position(tower, token_ids)
        x = tower.transformer(x, attn_mask=mask)
        pooled = x[torch.arange(len(x), device=x.device), pooled_position]
    else:  # the class token keeps its position after the whole context
        class_token = (tower.cls_emb.to(dtype) + positions[context]).expand(len(x), 1, -1)
        padding_mask = tower._build_additive_mask(token_ids, length + 1, dtype)
        if tower.attn_mask is not None:
            padding_mask = padding_mask + tower.attn_mask[: length + 1, : length + 1]
        pooled = tower.transformer(torch.cat([x, class_token], dim=1), attn_mask=padding_mask)[:, -1]
    pooled = tower.ln_final(pooled)
    projection = tower.text_projection
    if projection is not None:
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    embeddings: Tensor = pooled
    return embeddings

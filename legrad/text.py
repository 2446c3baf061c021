"""Embed texts as unit vectors: each text once, in batches of similar length, with little padding."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip import CLIP, CoCa, CustomTextCLIP, transformer
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from legrad.arguments import as_texts
from legrad.errors import InputError, TokenizerError
from legrad.families.modules import GLOBAL_HOOKS, HOOKS
from legrad.memory import uploaded
from legrad.tokens import RowTokenizer, Tokenizer

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
# Few texts fit into the caches of a CPU; on a GPU, launching kernels is the cost.
CPU_BATCH_SIZE, DEVICE_BATCH_SIZE = 16, 256


def embed_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], embed_dim: int, device: torch.device
) -> Float[Tensor, "prompts embed_dim"]:
    """Embed texts with a model's text tower, in batches; a text that repeats is embedded once.

    Args:
        model: an open_clip model.
        tokenizer: as returned by `open_clip.get_tokenizer`; it truncates texts at its context length.
        texts: any number of texts, including none; see `legrad.arguments.as_texts`.
        embed_dim: dimension of the joint space.
        device: of the model.

    Returns:
        One unit row for each text, in order; float32 (float64 for a float64 model) at any precision of the
        model.

    Raises:
        InputError: the text tower is in training mode with active dropout, so that embeddings would be
            random; the tokenizer is not the model's; or `texts` is no collection of texts.
    """
    texts = as_texts(texts)
    refuse_active_dropout(model)
    if not texts:
        return torch.zeros(0, embed_dim, device=device)
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unit_rows = embed_tokens(model, RowTokenizer(tokenizer).token_ids(list(row_of)), device)
    return unit_rows[uploaded(torch.tensor([row_of[text] for text in texts]), device)]


def embed_tokens(
    model: nn.Module,
    token_ids: Int[Tensor, "prompts context"],
    device: torch.device,
    batch_size: int | None = None,
) -> Float[Tensor, "prompts embed_dim"]:
    """Embed tokenised texts; see `embed_by_length`, which this brings back to the order of the texts."""
    unit_rows, by_length = embed_by_length(model, token_ids, device, batch_size)
    return unit_rows[uploaded(by_length.argsort(), device)]


@torch.no_grad()
def embed_by_length(
    model: nn.Module,
    token_ids: Int[Tensor, "prompts context"],
    device: torch.device,
    batch_size: int | None = None,
    is_causal: Callable[[Tensor | None], bool] | None = None,
) -> tuple[Float[Tensor, "prompts embed_dim"], Int[Tensor, " prompts"]]:
    """Embed tokenised texts from the shortest to the longest, in batches.

    Trailing tokens that no embedding of a batch depends on are cut. Towers in which padding affects the
    result, such as SigLIP's, get all tokens. Autocast is disabled.

    Args:
        model: an open_clip model.
        token_ids: padded token ids from the model's tokenizer, on the CPU; at least one text.
        device: device of the model.
        batch_size: number of texts per batch; None: a default for the device.
        is_causal: decides whether an attention mask is causal; None: by reading it.

    Returns:
        Unit rows, as in `embed_texts`, from the shortest text to the longest; and, on the CPU, the position
        of each of them among the texts.

    Raises:
        InputError: the tokens do not fit the text tower.
    """
    tower = _text_tower(model)
    _check_tokens(tower, token_ids)
    known_tower = tower if _is_known(model, tower) else None
    lengths = _needed_lengths(known_tower, token_ids, is_causal or _is_causal)
    size = batch_size or (CPU_BATCH_SIZE if device.type == "cpu" else DEVICE_BATCH_SIZE)
    by_length = lengths.argsort()
    longest_of_batch = [int(lengths[rows[-1]]) for rows in torch.split(by_length, size)]
    sorted_ids = uploaded(token_ids[by_length, : longest_of_batch[-1]], device)
    batches = []
    for batch, length in zip(torch.split(sorted_ids, size), longest_of_batch, strict=True):
        with torch.autocast(device.type, enabled=False):
            embeddings = _encode(model, known_tower, batch[:, :length], token_ids.shape[1])
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        batches.append(F.normalize(embeddings, dim=-1))
    return batches[0] if len(batches) == 1 else torch.cat(batches), by_length


class CausalMaskReader:
    """Decides whether an attention mask is causal, and reads a mask again only if it has changed.

    Reading a mask on a GPU waits for all kernels launched before.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, bool] | None = None

    def __call__(self, mask: Tensor | None) -> bool:
        """Return whether a mask keeps every token from attending to later ones."""
        if mask is None or mask.is_inference():  # changes of inference tensors are not counted
            return _is_causal(mask)
        last = self._last
        if last is None or last[0] is not mask or last[1] != mask._version:
            last = self._last = (mask, mask._version, _is_causal(mask))
        return last[2]


def refuse_active_dropout(model: nn.Module) -> None:
    """Raise an InputError if dropout would make the model's text embeddings random."""
    for name, module in model.named_modules():
        if module.training and not name.startswith("visual.") and _drops(module):
            raise InputError(
                f"embed_text: {name} drops activations in training mode; call model.eval() first"
            )


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of an explainer; raise a TokenizerError if there is none."""
    if tokenizer is None:
        raise TokenizerError(
            "embed_text: this LeGrad has no tokenizer; make it with LeGrad.from_open_clip, "
            "or pass tokenizer=open_clip.get_tokenizer(model_name)"
        )
    return tokenizer


def _drops(module: nn.Module) -> bool:
    """Return whether a module has active dropout, by its class or by its dropout rates."""
    rates = [getattr(module, "p", 0)] if "Dropout" in type(module).__name__ else []
    rates += [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
    return any(rate > 0 for rate in rates)


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


def _check_tokens(tower: Any, token_ids: Int[Tensor, "prompts context"]) -> None:
    context = tower.context_length if isinstance(tower, CLIP | TextTransformer) else token_ids.shape[1]
    vocabulary = int(getattr(tower, "vocab_size", 0)) or int(token_ids.max()) + 1
    if token_ids.shape[1] > context or token_ids.max() >= vocabulary:
        raise InputError(
            f"embed_text: the text tower takes {context} tokens with ids below {vocabulary}, "
            f"the tokenizer gives {token_ids.shape[1]} with ids up to {int(token_ids.max())}; "
            "use the model's own tokenizer, open_clip.get_tokenizer(model_name)"
        )


def _needed_lengths(
    tower: Any, token_ids: Int[Tensor, "prompts context"], is_causal: Callable[[Tensor | None], bool]
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


def _is_causal(mask: Tensor | None) -> bool:
    """Return whether a mask keeps every token from attending to later ones, of which some are padding."""
    return mask is not None and bool(mask.isneginf()[torch.ones_like(mask, dtype=torch.bool).triu(1)].all())


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

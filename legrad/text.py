"""Embed texts as unit vectors: each text once, in batches of similar length, with little padding."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from legrad.arguments import as_texts
from legrad.errors import InputError, TokenizerError
from legrad.families import source_of
from legrad.families.source import IsCausal, TextEncoder
from legrad.memory import uploaded
from legrad.tokens import RowTokenizer, Tokenizer

# Few texts fit into the caches of a CPU; on a GPU, launching kernels is the cost.
CPU_BATCH_SIZE, DEVICE_BATCH_SIZE = 16, 256


def embed_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], embed_dim: int, device: torch.device
) -> Float[Tensor, "prompts embed_dim"]:
    """Embed texts with a model's text tower, in batches; a text that repeats is embedded once.

    Args:
        model: see `legrad.LeGrad`.
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
    is_causal: IsCausal | None = None,
) -> tuple[Float[Tensor, "prompts embed_dim"], Int[Tensor, " prompts"]]:
    """Embed tokenised texts from the shortest to the longest, in batches.

    Trailing tokens that no embedding of a batch depends on are cut. Towers in which padding affects the
    result, such as SigLIP's, get all tokens. Autocast is disabled.

    Args:
        model: see `legrad.LeGrad`.
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
    encoder = _encoder_of(model)
    _check_tokens(encoder, token_ids)
    lengths = encoder.needed_lengths(token_ids, is_causal or _is_causal)
    size = batch_size or (CPU_BATCH_SIZE if device.type == "cpu" else DEVICE_BATCH_SIZE)
    by_length = lengths.argsort()
    longest_of_batch = [int(lengths[rows[-1]]) for rows in torch.split(by_length, size)]
    sorted_ids = uploaded(token_ids[by_length, : longest_of_batch[-1]], device)
    batches = []
    for batch, length in zip(torch.split(sorted_ids, size), longest_of_batch, strict=True):
        with torch.autocast(device.type, enabled=False):
            embeddings = encoder.encode(batch[:, :length], token_ids.shape[1])
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
    vision_tower = source_of(model).visual_path
    for name, module in model.named_modules():
        if module.training and not name.startswith(f"{vision_tower}.") and _drops(module):
            raise InputError(
                f"embed_text: {name} drops activations in training mode; call model.eval() first"
            )


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of an explainer; raise a TokenizerError if there is none."""
    if tokenizer is None:
        raise TokenizerError(
            "embed_text: this LeGrad has no tokenizer; make it with LeGrad.from_open_clip, or pass "
            "tokenizer=open_clip.get_tokenizer(model_name), or the processor of a model of transformers"
        )
    return tokenizer


def _drops(module: nn.Module) -> bool:
    """Return whether a module has active dropout, by its class or by its dropout rates."""
    rates = [getattr(module, "p", 0)] if "Dropout" in type(module).__name__ else []
    rates += [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
    return any(rate > 0 for rate in rates)


def _encoder_of(model: nn.Module) -> TextEncoder:
    encoder = source_of(model).texts
    if encoder is None:
        raise InputError(
            f"embed_text: a {type(model).__name__} is a classifier without a text tower; explain its classes "
            "by their numbers (class_index)"
        )
    return encoder()


def _check_tokens(encoder: TextEncoder, token_ids: Int[Tensor, "prompts context"]) -> None:
    number, largest = token_ids.shape[1], int(token_ids.max())
    context = number if encoder.context is None else encoder.context
    vocabulary = largest + 1 if encoder.vocabulary is None else encoder.vocabulary
    if number > context or largest >= vocabulary:
        raise InputError(
            f"embed_text: the text tower takes {context} tokens with ids below {vocabulary}, "
            f"the tokenizer gives {number} with ids up to {largest}; "
            f"use the model's own tokenizer, {encoder.tokenizer}"
        )


def _is_causal(mask: Tensor | None) -> bool:
    """Return whether a mask keeps every token from attending to later ones, of which some are padding."""
    return mask is not None and bool(mask.isneginf()[torch.ones_like(mask, dtype=torch.bool).triu(1)].all())

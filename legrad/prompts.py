"""From texts to unit embeddings."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from legrad.errors import InputError

# open_clip's tokenizers share no class: called with texts they give tokens, and they have a context_length.
Tokenizer: TypeAlias = Any
TEXT_BATCH_SIZE = 256


@torch.no_grad()
def embed_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], embed_dim: int, device: torch.device
) -> Float[Tensor, "prompts embed_dim"]:
    """Embed texts with a model's text tower, in batches.

    Args:
        model: an open_clip model.
        tokenizer: as `open_clip.get_tokenizer` gives it; it cuts longer texts at its context length.
        texts: any number of texts, also none.
        embed_dim: dimension of the joint space.
        device: of the model.

    Returns:
        One unit row for each text, in order; float32 (float64 for a float64 model) at any precision of the
        model.

    Raises:
        InputError: the text tower is in training mode with active dropout; embeddings would be random.
    """
    refuse_active_dropout(model)
    batches = [
        F.normalize(
            _encode(model, tokenizer(list(texts[start : start + TEXT_BATCH_SIZE])).to(device)), dim=-1
        )
        for start in range(0, len(texts), TEXT_BATCH_SIZE)
    ]
    return torch.cat(batches) if batches else torch.zeros(0, embed_dim, device=device)


def truncated(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bool]:
    """Say for each text whether the tokenizer cuts it at its context length.

    Args:
        tokenizer: as `open_clip.get_tokenizer` gives it.
        texts: any number of texts.
    """
    return [count > tokenizer.context_length for count in _token_counts(tokenizer, texts)]


def refuse_active_dropout(model: nn.Module) -> None:
    """Raise an InputError where dropout would make the model's text embeddings random."""
    for name, module in model.named_modules():
        active = module.training and float(getattr(module, "p", 0)) > 0 and "Dropout" in type(module).__name__
        if active and not name.startswith("visual."):
            raise InputError(
                f"embed_text: {name} drops activations in training mode; call model.eval() first"
            )


def _encode(model: Any, tokens: Int[Tensor, "prompts context"]) -> Float[Tensor, "prompts embed_dim"]:
    embeddings: Tensor = model.encode_text(tokens)
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _token_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Count the tokens of each uncut text, start and end marks included."""
    pretrained = getattr(tokenizer, "tokenizer", None)
    if pretrained is None:
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    if not texts:
        return []
    # open_clip's "clips" mode puts a class token behind the two marks.
    class_tokens = int(getattr(tokenizer, "tokenizer_mode", "") == "clips")
    token_ids = pretrained([tokenizer.clean_fn(text) for text in texts], truncation=False)["input_ids"]
    return [len(ids) + class_tokens for ids in token_ids]

"""Models of OpenAI's `clip` package; and its archives, by their state: weights alone, without their code."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from legrad.errors import UnsupportedModelError
from legrad.families import clip as own_clip
from legrad.families.modules import KnownModules, check_modules, located
from legrad.families.parts import (
    NotCovered,
    check_affine_norm,
    class_name,
    describe_blocks,
    qualified_name,
)
from legrad.families.source import Source, TextEncoder, whole_context
from legrad.images import ImageTransform
from legrad.method.stages import Activation, Linear, Norm
from legrad.method.towers import Block, Scoring, Tower
from legrad.tokens import Tokenizer

PACKAGE = "clip.model"
SUPPORTED = "the vision transformers of OpenAI's clip package"
EXPECTED = "explain the model that clip.load returns"
HEAD_WIDTH = 64  # of all of OpenAI's models
VOCABULARY = 49408  # of OpenAI's tokenizer
# Numbers that OpenAI's archives hold beside the weights. Weights that open_clip trained have the same names
# and shapes, but lack these.
_SETTINGS = ("input_resolution", "context_length", "vocab_size")


def source(model: Any, _processor: Any = None) -> Source:
    """Return the source of a model of the class `clip.model.CLIP`.

    Raises:
        UnsupportedModelError: it is of another class, such as a subclass.
    """
    package = import_module(PACKAGE)
    if type(model) is not package.CLIP:
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: of OpenAI's clip package, expected a model of clip.model.CLIP, "
            f"not a subclass or a part of it. Way out: {EXPECTED}"
        )
    visual = model.visual
    known = _known(package)
    side = int(visual.input_resolution)
    return Source(
        library="clip",
        model=model,
        visual=visual,
        visual_path="visual",
        name=f"clip.model.CLIP with a vision tower {type(visual).__name__}",
        describe=partial(_describe, package, known, visual),
        known=known,
        entry=(("encode_image",), (package.CLIP.encode_image,)),
        own_features=model.encode_image,
        block_paths=lambda: tuple(
            f"visual.transformer.resblocks.{index}" for index in range(len(visual.transformer.resblocks))
        ),
        transform=lambda: ImageTransform(side, side, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        expected=EXPECTED,
        supported=SUPPORTED,
        texts=lambda: TextEncoder(
            needed_lengths=whole_context,
            encode=lambda token_ids, _context: model.encode_text(token_ids),
            context=int(model.context_length),
            vocabulary=int(model.vocab_size),
            tokenizer="clip.tokenize",
        ),
        as_tokenizer=partial(_as_tokenizer, model),
    )


def _known(package: Any) -> KnownModules:
    kinds = (package.VisionTransformer, package.Transformer, package.ResidualAttentionBlock)
    torch_kinds = (nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention, nn.Sequential)
    return KnownModules(
        frozenset({*kinds, package.LayerNorm, *torch_kinds}),
        called=("conv1",),
        activations=("gelu",),
        same_as={package.QuickGELU: QuickGELU()},
    )


def _describe(package: Any, known: KnownModules, visual: Any) -> Tower:
    with located({"visual": visual}, known):
        if type(visual) is not package.VisionTransformer:
            is_convolutional = type(visual) is package.ModifiedResNet
            why = "is convolutional: its only attention pools a feature map at the end"
            reason = f"a {type(visual).__name__} {why if is_convolutional else 'is not covered'}"
            raise NotCovered(reason, None if is_convolutional else visual)
        check_modules(visual, known)
        for name in ("ln_pre", "ln_post"):
            check_affine_norm(getattr(visual, name), name)
        if visual.proj is None:
            raise NotCovered("its final projection was removed")
        return _tower(package, known, visual)


def _tower(package: Any, known: KnownModules, visual: Any) -> Tower:
    patch_size = int(visual.conv1.kernel_size[0])
    side = int(visual.input_resolution)
    grid = (side // patch_size, side // patch_size)
    head = (Norm(visual.ln_post), Linear(lambda: visual.proj.T, lambda: None))
    reference = Scoring((), slice(0, None), head)
    return Tower(
        family="clip",
        patch_size=patch_size,
        native_grid=grid,
        native_size=(side, side),
        takes_any_grid=True,
        embed_dim=visual.proj.shape[1],
        prefix_tokens=own_clip.PREFIX_TOKENS,
        normalisation="upsampled",
        embed=partial(own_clip.embed, visual, grid),
        blocks=describe_blocks(
            visual.transformer.resblocks, partial(_describe_block, package.ResidualAttentionBlock, known)
        ),
        reference=reference,
        authors=reference,
        own=Scoring((), slice(0, 1), head),
        parameter=lambda: visual.conv1.weight,
    )


def _describe_block(kind: type[nn.Module], known: KnownModules, block: Any) -> Block:
    if type(block) is not kind:
        raise NotCovered(f"it is {class_name(block)}, not a ResidualAttentionBlock", block)
    own_clip.check_block_parts(block)
    if block.attn_mask is not None:
        raise NotCovered("its attention has a mask", block)
    activation = block.mlp.gelu
    return Block(
        norm=block.ln_1,
        project=partial(own_clip.project, block.attn),
        out=(Linear.of(block.attn.out_proj),),
        mlp=(
            Norm(block.ln_2),
            Linear.of(block.mlp.c_fc),
            Activation(known.same_as.get(type(activation), activation)),
            Linear.of(block.mlp.c_proj),
        ),
    )


def _as_tokenizer(model: Any, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """Return OpenAI's tokenizer, which truncates long texts, where the caller passed it or none."""
    is_own = getattr(tokenizer, "__module__", None) == "clip.clip"
    return own_tokenizer(model) if tokenizer is None or is_own else tokenizer


def own_tokenizer(model: Any) -> Tokenizer | None:
    """Return OpenAI's tokenizer for a model with its vocabulary, otherwise None."""
    if int(model.vocab_size) != VOCABULARY:
        return None
    return SimpleTokenizer(context_length=int(model.context_length))


def model_of_state(state: Mapping[str, Tensor]) -> nn.Module:
    """Return open_clip's own model with the weights of one of OpenAI's, which it shares.

    Args:
        state: `state_dict()` of one of OpenAI's TorchScript archives as `torch.jit.load` returns it. Names
            and shapes decide; no code that an archive holds is run.

    Raises:
        UnsupportedModelError: names or shapes are not those of a vision transformer of OpenAI's clip.
    """
    weights = {name: tensor for name, tensor in state.items() if name not in _SETTINGS}
    try:
        if missing := [name for name in _SETTINGS if name not in state]:
            raise KeyError(missing[0])
        model = _empty_model(weights)
        model.load_state_dict(weights, strict=True, assign=True)
    except (KeyError, IndexError, RuntimeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            "a state (a mapping of names to weights, or a TorchScript module): expected the names and shapes "
            "of an archive of OpenAI's clip with a vision transformer, which it does not have "
            f"({type(error).__name__}: {reason[:300]}). Without {', '.join(_SETTINGS)} it may be of "
            "a model with another activation. Way out: load the weights into a model of your library, and "
            "explain that"
        ) from error
    return model.eval()


def _empty_model(weights: Mapping[str, Tensor]) -> nn.Module:
    patches = weights["visual.conv1.weight"]
    width, text_width = patches.shape[0], weights["ln_final.weight"].shape[0]
    positions, vocabulary = (
        weights["positional_embedding"].shape[0],
        weights["token_embedding.weight"].shape[0],
    )
    cells = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    vision = {
        "layers": _blocks(weights, "visual.transformer."),
        "width": width,
        "head_width": HEAD_WIDTH,
        "patch_size": patches.shape[-1],
        "image_size": cells * patches.shape[-1],
    }
    text = {
        "context_length": positions,
        "vocab_size": vocabulary,
        "width": text_width,
        "heads": text_width // HEAD_WIDTH,
        "layers": _blocks(weights, "transformer."),
    }
    is_half = patches.dtype in (torch.float16, torch.bfloat16)
    model: nn.Module = open_clip.CLIP(
        weights["text_projection"].shape[1],
        vision,
        text,
        quick_gelu=True,
        cast_dtype=patches.dtype if is_half else None,
    )
    return model


def _blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    return sum(
        name.startswith(f"{prefix}resblocks.") and name.endswith(".attn.in_proj_weight") for name in weights
    )

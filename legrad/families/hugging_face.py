"""Models of Hugging Face transformers: CLIPModel, SiglipModel, and Siglip2Model of the NaFlex checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from legrad.errors import UnsupportedModelError
from legrad.families import hf_clip, hf_siglip
from legrad.families.hf_inputs import transform_of_processor
from legrad.families.hf_parts import native_size
from legrad.families.modules import GLOBAL_HOOKS, KnownModules, acting_hooks
from legrad.families.parts import qualified_name
from legrad.families.source import IsCausal, Source, TextEncoder, whole_context
from legrad.images import ImageTransform
from legrad.method.towers import Tower
from legrad.tokens import tokenizer_of_transformers

SUPPORTED = "CLIPModel, SiglipModel and Siglip2Model of transformers"
EXPECTED = "explain the model that transformers' from_pretrained returns"
TOKENIZER = "that of its processor (transformers.AutoProcessor)"
_HALF = (0.5, 0.5, 0.5)
# Attention of transformers that keeps to a causal mask.
_ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
_CAUSAL_TEXT_MODULES = (
    *(getattr(clip, name) for name in ("CLIPTextModel", "CLIPTextTransformer") if hasattr(clip, name)),
    *(clip.CLIPTextEmbeddings, clip.CLIPEncoder, clip.CLIPEncoderLayer, clip.CLIPAttention, clip.CLIPMLP),
    *(nn.Embedding, nn.Linear, nn.LayerNorm, nn.ModuleList),
)


@dataclass(frozen=True)
class _Family:
    """What depends on the class of a model.

    Attributes:
        describe: describes the vision tower.
        known: the modules that the description covers.
        image_features: the class's own `get_image_features`.
        mean: of each colour channel, for a model without processor.
        std: of each colour channel, for a model without processor.
    """

    describe: Callable[[Any], Tower]
    known: KnownModules
    image_features: object
    mean: tuple[float, float, float] = _HALF
    std: tuple[float, float, float] = _HALF


# The original methods, to notice one that is replaced later.
_FAMILIES: dict[type[nn.Module], _Family] = {
    clip.CLIPModel: _Family(
        hf_clip.describe,
        hf_clip.KNOWN,
        clip.CLIPModel.get_image_features,
        OPENAI_DATASET_MEAN,
        OPENAI_DATASET_STD,
    ),
    siglip.SiglipModel: _Family(hf_siglip.describe, hf_siglip.KNOWN, siglip.SiglipModel.get_image_features),
    siglip2.Siglip2Model: _Family(
        hf_siglip.describe, hf_siglip.KNOWN, siglip2.Siglip2Model.get_image_features
    ),
}


def source(model: Any, processor: Any = None) -> Source:
    """Return the source of a model.

    Args:
        model: a CLIPModel, SiglipModel or Siglip2Model, not of a subclass.
        processor: its processor or image processor; None: the usual preprocessing of its family.

    Raises:
        UnsupportedModelError: it is of another class.
    """
    family = _FAMILIES.get(type(model))
    if family is None:
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: of the models of transformers, expected one of the supported "
            f"classes, not a subclass. Supported: {SUPPORTED}. Way out: load the checkpoint with its own "
            "class, such as CLIPModel.from_pretrained"
        )
    visual = model.vision_model
    is_clip = type(model) is clip.CLIPModel
    others = {name: part for name, part in model.named_children() if name == "visual_projection"}
    return Source(
        library="transformers",
        model=model,
        visual=visual,
        visual_path="vision_model",
        name=f"{type(model).__name__} with a vision tower {type(visual).__name__}",
        describe=partial(family.describe, model),
        known=family.known,
        entry=(("get_image_features",), (family.image_features,)),
        own_features=partial(_image_features, model),
        block_paths=lambda: tuple(
            f"vision_model.encoder.layers.{index}" for index in range(len(visual.encoder.layers))
        ),
        transform=lambda: transform_of_processor(
            processor, ImageTransform(*native_size(visual), family.mean, family.std)
        ),
        expected=EXPECTED,
        supported=SUPPORTED,
        others=others,
        texts=partial(_text_encoder, model),
        as_tokenizer=lambda tokenizer: tokenizer_of_transformers(
            tokenizer, processor, _context(model), lower_case=not is_clip
        ),
    )


def _image_features(
    model: Any, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch embed_dim"]:
    """Return what the model itself computes, for images of any size."""
    if type(model) is siglip2.Siglip2Model:
        patches, grids = hf_siglip.patches_of(images, model.vision_model.embeddings.patch_size)
        every = torch.ones(patches.shape[:2], dtype=torch.int64, device=images.device)
        return _pooled(
            model.get_image_features(pixel_values=patches, pixel_attention_mask=every, spatial_shapes=grids)
        )
    resized = tuple(images.shape[-2:]) != native_size(model.vision_model)
    return _pooled(model.get_image_features(images, interpolate_pos_encoding=resized))


def _pooled(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _text_embeddings(model: Any) -> Any:
    text = model.text_model
    return text.embeddings if hasattr(text, "embeddings") else text.text_model.embeddings


def _context(model: Any) -> int:
    return int(_text_embeddings(model).position_embedding.num_embeddings)


def _text_encoder(model: Any) -> TextEncoder:
    """Return how the tokens of texts become embeddings.

    No mask of the padding is passed: CLIP's embedding does not depend on what follows the end of a text, and
    SigLIP is trained with its padding in sight. A CLIP that computes what its classes define gets no tokens
    after the longest end of a batch.
    """
    is_cut = type(model) is clip.CLIPModel and _is_causal_as_defined(model.text_model)
    return TextEncoder(
        needed_lengths=partial(_lengths_to_end, model) if is_cut else whole_context,
        encode=lambda token_ids, _context: _pooled(model.get_text_features(input_ids=token_ids)),
        context=_context(model),
        vocabulary=int(_text_embeddings(model).token_embedding.num_embeddings),
        tokenizer=TOKENIZER,
    )


def _is_causal_as_defined(text: Any) -> bool:
    """Return whether a text tower of CLIP is as its classes define it, so that tokens see earlier ones."""
    known = hf_clip.KNOWN
    activations = [module for name, module in text.named_modules() if name.endswith(known.activations)]
    return (
        text.config._attn_implementation in _ATTENTIONS
        and not any(getattr(torch_module, hooks) for hooks in GLOBAL_HOOKS)
        and all(
            (type(module) in _CAUSAL_TEXT_MODULES or module in activations)
            and "forward" not in vars(module)
            and not acting_hooks({**module._forward_hooks, **module._forward_pre_hooks}, known)
            for module in text.modules()
        )
    )


def _lengths_to_end(
    model: Any, token_ids: Int[Tensor, "texts context"], _is_causal: IsCausal
) -> Int[Tensor, " texts"]:
    """Return the number of tokens up to the one that CLIP pools.

    Source: `CLIPTextModel.forward`; configurations of the first years name a wrong end, 2.
    """
    end = model.text_model.eos_token_id
    is_end = token_ids if end == 2 else (token_ids == end).int()
    return is_end.argmax(dim=1) + 1

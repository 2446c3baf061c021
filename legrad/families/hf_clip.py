"""Describe the CLIPModel of Hugging Face transformers."""

from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as library

from legrad.families.hf_parts import (
    check_embeddings,
    describe_block,
    embedded,
    known_modules,
    linear,
    native_size,
    norm,
)
from legrad.families.modules import check_modules, check_nothing_hangs_on, located
from legrad.families.parts import NotCovered, class_name, describe_blocks
from legrad.method.stages import Linear
from legrad.method.towers import EmbeddedImages, Scoring, Tower

PREFIX_TOKENS = 1
# In earlier versions the tower was a module within a model of the first name.
VISUAL = tuple(
    getattr(library, name) for name in ("CLIPVisionModel", "CLIPVisionTransformer") if hasattr(library, name)
)
KNOWN = known_modules(
    *VISUAL,
    *(library.CLIPEncoder, library.CLIPEncoderLayer, library.CLIPAttention, library.CLIPMLP),
)


def describe(model: Any) -> Tower:
    """Describe the vision tower of a model, with the projection that follows it.

    Raises:
        NotCovered: a part of it is not covered.
    """
    with located({"": model}, KNOWN):
        visual, projection = model.vision_model, model.visual_projection
        if type(visual) not in VISUAL:
            raise NotCovered(f"{class_name(visual)} is not covered", visual)
        check_modules(visual, KNOWN)
        check_nothing_hangs_on(projection, KNOWN)
        return _describe(visual, linear(projection))


def _describe(visual: Any, projection: Linear) -> Tower:
    embeddings = visual.embeddings
    check_embeddings(embeddings, library.CLIPVisionEmbeddings, nn.Conv2d)
    patch_size = int(embeddings.patch_size)
    height, width = native_size(visual)
    norm(visual.pre_layrnorm, "pre_layrnorm")
    (last_norm,) = norm(visual.post_layernorm, "post_layernorm")
    reference = Scoring((), slice(0, None), (last_norm, projection))
    return Tower(
        family="clip",
        patch_size=patch_size,
        native_grid=(height // patch_size, width // patch_size),
        native_size=(height, width),
        takes_any_grid=True,
        embed_dim=projection.weight().shape[0],
        prefix_tokens=PREFIX_TOKENS,
        normalisation="upsampled",
        embed=partial(_embed, visual),
        blocks=describe_blocks(visual.encoder.layers, partial(describe_block, library.CLIPEncoderLayer)),
        reference=reference,
        authors=reference,
        own=Scoring((), slice(0, 1), (last_norm, projection)),
        parameter=lambda: embeddings.patch_embedding.weight,
    )


def _embed(visual: Any, images: Float[Tensor, "batch 3 height width"]) -> EmbeddedImages:
    return EmbeddedImages(visual.pre_layrnorm(embedded(visual, images)))

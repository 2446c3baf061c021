"""Baseline maps to compare LeGrad with, on the same model: `baseline`, `baseline_grids` and `BASELINES`.

All are raw grids on the patch grid, one for each image and text, or class of a classifier, so that
upsampling, normalisation and thresholds are the same as for LeGrad. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from legrad.arguments import shown
from legrad.checks import check_images
from legrad.classes import ClassIndex
from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.inputs import RaggedPrompts
from legrad.method.trace import Trace, run_normed_block, score_features, trace_images
from legrad.quality.attention_baselines import (
    attention_rollout,
    chefercam,
    mean_query_attention,
    raw_attention,
)
from legrad.quality.dense_baselines import maskclip, naclip, patch_text_similarity, sclip
from legrad.quality.pairs import PairGrids, Pairs, as_prompts

CENTRE_PRIOR_SIGMA = 0.25  # standard deviation of the centre prior, as a share of each side


@dataclass(frozen=True)
class Baseline:
    """A method to compare LeGrad with.

    The range holds for models that compare images with texts. Of a classifier, the maps of "patch_text",
    "maskclip", "sclip" and "naclip" are logits, which have no bounds; all others keep their range.

    Attributes:
        title: its name in tables.
        depends_on_text: whether the map differs between texts, or classes.
        low: lowest value that a cell can have.
        high: highest value, or None if there is no bound.
        source: paper that defines it, or what it is.
        blocks: number of last blocks that a trace must hold; None: all.
        needs_images: whether a trace is not enough.

    Example:
        >>> method = legrad.BASELINES["gradcam"]
        >>> method.depends_on_text, method.low, method.high
        (True, 0.0, None)
    """

    title: str
    depends_on_text: bool
    low: float
    high: float | None
    source: str
    blocks: int | None = 2
    needs_images: bool = False
    compute: Callable[[Pairs], PairGrids] = field(kw_only=True, repr=False)


def baseline(
    explainer: LeGrad,
    method: str,
    images: Float[Tensor, "batch 3 height width"] | Trace,
    text_embeddings: Float[Tensor, "*leading embed_dim"] | RaggedPrompts | None = None,
    image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
    *,
    class_index: ClassIndex | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*maps grid_height grid_width"]:
    """Compute the raw maps of one baseline; the arguments are those of `LeGrad.relevance`.

    Args:
        explainer: the model; its options `layers`, `pool` and `affinity` are not used.
        method: a key of `legrad.BASELINES`.
        images: preprocessed images; or, for methods that do not need the images, their trace.
        text_embeddings: as in `LeGrad.relevance`; ignored by methods that do not depend on the text, except
            for the number of maps.
        image_index: for each prompt, the row of its image.
        class_index: of a classifier, which takes it instead of text embeddings, in the forms of
            `LeGrad.relevance`; the score is then the logit of the class, not a cosine.
        generator: generator of the method "random", on the CPU; None: a new one with the seed 0.

    Returns:
        [batch, prompts, grid_height, grid_width], or with `image_index` [prompts, grid_height, grid_width];
        float32, in the range of `legrad.BASELINES[method]`. `legrad.heatmaps_of` makes heat maps of them.

    Raises:
        InputError: the method is unknown or needs what was not given; texts for a classifier, or classes for
            another model; shapes, dtypes, devices or indices do not fit.
        UnsupportedModelError: the model was changed into one that cannot be explained.

    Example:
        >>> pixels, texts = explainer.preprocess([image]), explainer.embed_text(["a banana", "a panda"])
        >>> legrad.baseline(explainer, "gradcam", pixels, texts).shape
        torch.Size([1, 2, 12, 12])
    """
    grids = baseline_grids(
        explainer,
        images,
        text_embeddings,
        image_index,
        class_index=class_index,
        methods=[method],
        generator=generator,
    )
    return grids[method]


def baseline_grids(
    explainer: LeGrad,
    images: Float[Tensor, "batch 3 height width"] | Trace,
    text_embeddings: Float[Tensor, "*leading embed_dim"] | RaggedPrompts | None = None,
    image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
    *,
    class_index: ClassIndex | None = None,
    methods: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Float[Tensor, "*maps grid_height grid_width"]]:
    """Compute the raw maps of several baselines from one forward pass.

    Args:
        explainer: as in `baseline`.
        images: as in `baseline`.
        text_embeddings: as in `baseline`.
        image_index: as in `baseline`.
        class_index: as in `baseline`.
        methods: keys of `legrad.BASELINES`; None: all of them.
        generator: as in `baseline`.

    Returns:
        The maps by method, as `baseline` returns them.

    Raises:
        InputError: as `baseline`.
        UnsupportedModelError: as `baseline`.

    Example:
        >>> pixels, texts = explainer.preprocess([image]), explainer.embed_text(["a banana", "a panda"])
        >>> maps = legrad.baseline_grids(explainer, pixels, texts, methods=["rollout", "patch_text"])
        >>> {method: tuple(grids.shape) for method, grids in maps.items()}
        {'rollout': (1, 2, 12, 12), 'patch_text': (1, 2, 12, 12)}
    """
    if isinstance(methods, str):
        raise InputError(f"methods: expected a list of keys of legrad.BASELINES, received {methods!r}")
    chosen = {name: _baseline_named(name) for name in (BASELINES if methods is None else methods)}
    explainer._follow_changes()
    tower = explainer.tower
    if isinstance(images, Trace):
        explainer._as_trace(images)  # raises unless it fits
    else:
        check_images(tower, images)
    prompts = (
        text_embeddings
        if isinstance(text_embeddings, RaggedPrompts)
        else as_prompts(tower, images, text_embeddings, class_index, image_index)
    )
    pairs = Pairs(
        tower,
        _traced(explainer, chosen, images),
        prompts.unit_rows,
        prompts.image_index,
        generator or torch.Generator().manual_seed(0),
        None if isinstance(images, Trace) else images,
    )
    return {name: each.compute(pairs).reshape(*prompts.leading, *pairs.grid) for name, each in chosen.items()}


def title_of(method: str, explainer: LeGrad) -> str:
    """Return the name of a baseline in tables, which for raw attention says whose attention it is."""
    if method != "raw_attention":
        return _baseline_named(method).title
    own = explainer.tower.own
    if own.pooler is not None:
        return "pooler attention"
    return "CLS attention" if own.pooled_tokens == slice(0, 1) else "attention of pooled tokens"


def _baseline_named(name: str) -> Baseline:
    if isinstance(name, str) and name in BASELINES:
        return BASELINES[name]
    nearest = get_close_matches(str(name), BASELINES, n=1)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    found = repr(name) if isinstance(name, str) else shown(name)
    raise InputError(f"method: expected one of {', '.join(BASELINES)}, received {found}{hint}")


def _traced(
    explainer: LeGrad, chosen: Mapping[str, Baseline], images: Float[Tensor, "batch 3 height width"] | Trace
) -> Trace:
    """Return the trace of checked images with the blocks that methods need; or a trace that was passed."""
    if isinstance(images, Trace):
        needing = [name for name, each in chosen.items() if each.needs_images]
        if needing:
            raise InputError(
                f"images: {', '.join(needing)} expected preprocessed images, received a trace, which lacks "
                "the tokens that enter the first block"
            )
        return images
    tower, depth = explainer.tower, len(explainer.tower.blocks)
    blocks = max([depth if each.blocks is None else each.blocks for each in chosen.values()], default=1)
    return trace_images(tower, images, min(blocks, depth), tower.own)


def gradcam(pairs: Pairs) -> PairGrids:
    """Compute GradCAM of the model's own cosine or logit at the normalised input of the last block.

    The activations are those after the block's first norm: for a model that pools its class token, the last
    ones in which the score depends on the patches. A channel's weight is its gradient averaged over the
    patches, and the map is the ReLU of the weighted sum of channels.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2; the layer is the usual choice for
        vision transformers (Gildenblat et al., pytorch-grad-cam).
    """
    tower, block = pairs.tower, pairs.tower.blocks[-1]
    residual = pairs.last_block_input[pairs.image_index]
    with torch.enable_grad():
        activations = block.norm(residual).detach().requires_grad_()
        layer = run_normed_block(block, residual, activations, pairs.trace.rotary)
        features = score_features(tower.own, layer.outputs)
        score = (pairs.compared(features) * pairs.unit_rows.float()).sum()
        gradient = torch.autograd.grad(score, activations)[0]
    channel_weights = gradient[:, tower.prefix_tokens :].float().mean(dim=1)
    weighted_sum = torch.einsum("ptc,pc->pt", activations.detach().float(), channel_weights)
    return pairs.patch_grids(weighted_sum.relu())


def centre_prior(pairs: Pairs) -> PairGrids:
    """Return a centred Gaussian with a standard deviation of 1/4 side; independent of image and text."""
    rows, columns = (((torch.arange(cells) + 0.5) / cells - 0.5) / CENTRE_PRIOR_SIGMA for cells in pairs.grid)
    prior = torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / 2)
    return prior.to(pairs.unit_rows.device).repeat(len(pairs.unit_rows), 1, 1)


def random_grids(pairs: Pairs) -> PairGrids:
    """Return independent uniform noise in every cell."""
    grids = torch.rand(len(pairs.unit_rows), *pairs.grid, generator=pairs.generator)
    return grids.to(pairs.unit_rows.device)


# The order is that of tables.
BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "gradcam": Baseline(
            "GradCAM, last block",
            depends_on_text=True,
            low=0.0,
            high=None,
            source="Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391",
            compute=gradcam,
        ),
        "patch_text": Baseline(
            "patch-text similarity",
            depends_on_text=True,
            low=-1.0,
            high=1.0,
            source="the dense features that MaskCLIP starts from, https://arxiv.org/abs/2112.01071",
            blocks=1,
            compute=patch_text_similarity,
        ),
        "maskclip": Baseline(
            "MaskCLIP",
            depends_on_text=True,
            low=-1.0,
            high=1.0,
            source="Zhou et al., ECCV 2022, https://arxiv.org/abs/2112.01071",
            compute=maskclip,
        ),
        "sclip": Baseline(
            "SCLIP",
            depends_on_text=True,
            low=-1.0,
            high=1.0,
            source="Wang et al., ECCV 2024, https://arxiv.org/abs/2312.01597",
            compute=sclip,
        ),
        "naclip": Baseline(
            "NACLIP",
            depends_on_text=True,
            low=-1.0,
            high=1.0,
            source="Hajimiri et al., WACV 2025, https://arxiv.org/abs/2404.08181",
            compute=naclip,
        ),
        "chefercam": Baseline(
            "CheferCAM",
            depends_on_text=True,
            low=0.0,
            high=None,
            source="Chefer et al., ICCV 2021, https://arxiv.org/abs/2103.15679",
            blocks=1,
            needs_images=True,
            compute=chefercam,
        ),
        "mean_query_attention": Baseline(
            "mean-query attention",
            depends_on_text=False,
            low=0.0,
            high=1.0,
            source="attention of the last block, averaged over heads and queries",
            compute=mean_query_attention,
        ),
        "raw_attention": Baseline(
            "raw attention",
            depends_on_text=False,
            low=0.0,
            high=1.0,
            source="Caron et al., ICCV 2021, https://arxiv.org/abs/2104.14294",
            compute=raw_attention,
        ),
        "rollout": Baseline(
            "attention rollout",
            depends_on_text=False,
            low=0.0,
            high=1.0,
            source="Abnar and Zuidema, ACL 2020, https://arxiv.org/abs/2005.00928",
            blocks=None,
            needs_images=True,
            compute=attention_rollout,
        ),
        "centre_prior": Baseline(
            "centre prior",
            depends_on_text=False,
            low=0.0,
            high=1.0,
            source="a Gaussian in the middle of the image",
            blocks=1,
            compute=centre_prior,
        ),
        "random": Baseline(
            "random",
            depends_on_text=False,
            low=0.0,
            high=1.0,
            source="uniform noise",
            blocks=1,
            compute=random_grids,
        ),
    }
)

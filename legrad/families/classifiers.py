"""Describe vision transformers with a classifier: timm's, DeiT with two heads, and torchvision's.

The features of such a tower are its logits, and a layer's score is one of them. Their families are not
covered by the authors' package; the reference is its way for CLIP: the mean over all tokens, then the model's
own norm and head. With attentional pooling it is the model's own path.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVit

from legrad.families import eva, relpos, timm_vit, torchvision_vit
from legrad.families.modules import IN_OPEN_CLIP, WRITTEN_OUT, KnownModules, check_modules, located
from legrad.families.parts import NotCovered, check_covered, qualified_name, why_not_covered
from legrad.families.source import Source
from legrad.families.timm_parts import HEAD_ACTIVATIONS, norm_stages
from legrad.images import ImageTransform, transform_from
from legrad.method.stages import EachToken, Linear
from legrad.method.towers import Scoring, Tower

SUPPORTED = (
    "timm's VisionTransformer, VisionTransformerDistilled (DeiT), Eva and VisionTransformerRelPos and "
    "torchvision's VisionTransformer, each with a classifier"
)
_TIMM: dict[type[nn.Module], Callable[[Any, nn.Module], Tower]] = {
    VisionTransformer: timm_vit.describe,
    VisionTransformerDistilled: timm_vit.describe,
    Eva: eva.describe,
    VisionTransformerRelPos: relpos.describe,
}
_FORWARDS = {kind: kind.forward for kind in (*_TIMM, TorchvisionVit)}
_IN_TIMM = KnownModules(
    WRITTEN_OUT | {VisionTransformerDistilled},
    called=("patch_embed.proj",),
    activations=IN_OPEN_CLIP.activations,
    called_with_children="patch_embed.backbone",
)
_IN_HEADS = frozenset({nn.Dropout, *HEAD_ACTIVATIONS})


def source(model: Any, _processor: object = None) -> Source:
    """Return the source of a model whose class, or a class that it extends, is of timm or torchvision."""
    library = "torchvision" if isinstance(model, TorchvisionVit) else "timm"
    known = _known(model)
    return Source(
        library=library,
        model=model,
        visual=model,
        visual_path="",
        name=qualified_name(type(model)),
        describe=partial(_described, model, known),
        known=known,
        entry=(("forward", "forward_features", "forward_head"), (_FORWARDS.get(type(model)),)),
        own_features=model,
        block_paths=partial(_block_paths, model),
        transform=partial(_transform, model),
        expected=f"explain the model that {library} makes",
        supported=SUPPORTED,
    )


def _known(model: Any) -> KnownModules:
    """Return the modules that are covered; dropout and activations are, if the model's head has them."""
    is_torchvision = isinstance(model, TorchvisionVit)
    head = getattr(model, "heads" if is_torchvision else "head", None)
    kinds = {type(layer) for layer in head.modules()} if isinstance(head, nn.Module) else set()
    base = torchvision_vit.KNOWN if is_torchvision else _IN_TIMM
    return replace(base, written_out=base.written_out | (kinds & _IN_HEADS))


def _described(model: Any, known: KnownModules) -> Tower:
    with located({"": model}, known):
        if type(model) not in _FORWARDS:
            why = why_not_covered(model)
            kind = type(model).__name__
            raise NotCovered(f"a {kind} {why or 'is not covered'}", None if why else model)
        check_modules(model, known)
        return describe(model)


def _block_paths(model: Any) -> tuple[str, ...]:
    is_torchvision = isinstance(model, TorchvisionVit)
    path = "encoder.layers" if is_torchvision else "blocks"
    return tuple(f"{path}.{name}" for name, _ in model.get_submodule(path).named_children())


def _transform(model: Any) -> ImageTransform:
    """Return the preprocessing, which timm's models hold; torchvision's get that of their first weights."""
    if isinstance(model, TorchvisionVit):
        return transform_from(model.image_size, torchvision_vit.PREPROCESSING)
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return transform_from(model.patch_embed.img_size, config)


def describe(model: Any) -> Tower:
    """Describe a classifier, given that its modules are of known classes.

    Raises:
        NotCovered: a part of it is not covered.
    """
    if type(model) is TorchvisionVit:
        return torchvision_vit.describe(model)
    if not any(isinstance(module, nn.Linear) for module in model.head.modules()):
        raise NotCovered(
            "it has no classifier, so that its score is undefined. Way out: give it one with "
            "`timm.create_model(..., num_classes=N)`, or set its `head` to your trained linear layer",
            model.head,
        )
    tower = _TIMM[type(model)](model, nn.Identity())
    own = replace(tower.own, is_unit=False)
    reference = own if own.pooler is not None else replace(tower.reference, is_unit=False)
    if type(model) is VisionTransformerDistilled:
        reference, own = _distilled_scorings(model)
    return replace(
        tower,
        family=_family(model),
        normalisation="upsampled",
        reference=reference,
        authors=reference,
        own=own,
        authors_neutral_text=None,
        is_classifier=True,
    )


def _family(model: nn.Module) -> str:
    return {Eva: "eva-classifier", VisionTransformerRelPos: "relpos-classifier"}.get(
        type(model), "timm-classifier"
    )


def _distilled_scorings(model: Any) -> tuple[Scoring, Scoring]:
    """Describe the mean of a DeiT's two heads, one on the class token and one on the distillation token."""
    heads = (model.head, model.head_dist)
    check_covered(
        (
            "its pooling norm, which it never applies, is not the identity",
            type(model.fc_norm) is not nn.Identity,
        ),
        ("it has register tokens, which it never uses", model.reg_token is not None),
    )
    for head in heads:
        if type(head) is not nn.Linear:
            raise NotCovered("its two heads are not linear layers", head)
    norm = norm_stages(model.norm)
    both = EachToken(tuple(Linear.of(head) for head in heads))
    mean = Linear(lambda: (heads[0].weight + heads[1].weight) / 2, lambda: _mean_bias(*heads))
    return (
        Scoring((), slice(0, None), (*norm, mean), is_unit=False),
        Scoring((*norm, both), slice(0, 2), (), is_unit=False),
    )


def _mean_bias(*heads: nn.Linear) -> Tensor | None:
    biases: list[Tensor] = [head.bias for head in heads if head.bias is not None]
    return torch.stack(biases).sum(dim=0) / len(heads) if biases else None

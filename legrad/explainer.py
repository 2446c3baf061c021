"""The public face of the method: one class that explains an open_clip model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from legrad.errors import InputError
from legrad.families.faithful import Snapshot, describe_model
from legrad.heatmaps import heatmaps_of
from legrad.images import Fit, ImageTransform, transform_of
from legrad.inputs import (
    as_ragged,
    as_unit_rows,
    check_fit,
    check_image_size,
    check_images,
    check_layers,
    check_pool,
    common_input_size,
    neutral_patches,
)
from legrad.loading import load_model
from legrad.method.relevance import relevance_grids
from legrad.method.trace import Pool, Trace, pool_of, trace_images
from legrad.text import embed_texts, require_tokenizer
from legrad.tokens import Tokenizer

# Made anew from the model wherever an explainer is copied to: they hold functions of the model's modules.
_DERIVED = ("tower", "scoring", "_layers", "_relevance_grids", "_snapshot")


@dataclass(frozen=True)
class _Options:
    """What an explainer was asked for, to be resolved for the tower that the model has."""

    layers: int | Literal["all"]
    pool: Pool
    image_size: int | tuple[int, int] | None
    fit: Fit


class LeGrad:
    """Relevance maps of an open_clip model: which patches of an image speak for which text.

    The model is left as it is found: its weights, its flags for gradients and training, the random state. It
    may be in training mode; patch dropout never acts.

    What is explained is always the model as it is at the call: weights that change in place are followed;
    where modules, hooks or settings of the vision tower have changed, it is described anew, or refused. To
    look for that takes about 0.15 ms a call for ViT-B/16, 0.3 ms for ViT-L/14, on one core. An
    explainer can be copied, deep-copied and pickled; a deep copy explains the copied model.

    The default map is the authors', but for two families. SigLIP: their package corrects every map by the map
    of the text "a photo of a". PE-Core, which their package does not have: tokens pass the model's final norm
    before its attentional pooler, and would not in theirs. `as_authors=True` of `heatmaps` and
    `legrad.explain_image` gives their map.

    Attributes:
        model: the explained model.
        tower: description of its vision tower.
        tokenizer: what `embed_text` tokenises with, or None.
        transform: its preprocessing.
        scoring: how a layer is scored, by the choice of `pool`.

    Source: Bousselham et al., https://arxiv.org/abs/2404.03214.
    """

    transform: ImageTransform

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        layers: int | Literal["all"] = 2,
        pool: Literal["reference", "model"] = "reference",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> None:
        """Prepare to explain a model.

        Args:
            model: an open_clip model; its vision tower decides whether it is supported.
            tokenizer: needed by `embed_text` alone.
            layers: how many of the last blocks to explain, or "all".
            pool: how a layer is scored. "reference": the authors' way: the mean over all tokens, or the
                block's tokens straight into an attentional pooler; "model": the model's own norm, pooling and
                head.
            image_size: of the model's input as preprocessed, (height, width) or one number, in pixels;
                multiples of the patch size. None: the model's own, rounded down to whole patches: a model of
                384 pixels and patches of 14 sees 378 of them.
            fit: "stretch" every image to that size; "keep" aspect ratios, with at most as many patches.
            compile: run what follows the forward pass through `torch.compile`. It pays where batches keep one
                shape and one number of prompts: another shape is compiled anew, for half a minute or so.

        Raises:
            UnsupportedModelError: the vision tower's structure is not covered, or the model computes
                something else than its classes say: adapters that are not merged, hooks, forward methods of
                its own. Names the module, its class, and the way out.
            InputError: an option does not fit the model.

        To make sure that the model is what is explained, one image of noise is encoded twice, by the model
        and in closed form: two forward passes of one image, once.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._compile = compile
        self._options = _Options(layers, check_pool(pool), image_size, fit)
        self._own_transform: ImageTransform | None = None
        self._describe()

    def _describe(self) -> None:
        """Describe the model as it is now, and resolve the options for it."""
        options, tower = self._options, describe_model(self.model)
        layers = check_layers(options.layers, tower)
        own_transform = transform_of(self.model.visual)  # type: ignore[arg-type]
        if own_transform == self._own_transform:
            transform = self.transform
        else:
            sized = _sized(own_transform, options.image_size, tower.patch_size)
            transform = replace(sized, fit=check_fit(options.fit, tower), patch_size=tower.patch_size)
        check_image_size(tower, transform.height, transform.width, "preprocessing")
        self._layers, self.tower = layers, tower
        self.transform, self._own_transform = transform, own_transform
        self.scoring = {"reference": tower.reference, "model": tower.own, "authors": tower.authors}[
            options.pool
        ]
        self._relevance_grids = torch.compile(relevance_grids) if self._compile else relevance_grids
        self._snapshot = Snapshot.of(self.model)

    def _follow_changes(self) -> None:
        if not self._snapshot.is_of(self.model):
            self._describe()

    def __copy__(self) -> "LeGrad":
        """Return another explainer of the same model."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __getstate__(self) -> dict[str, object]:
        """Give all that is not derived from the model."""
        return {name: value for name, value in vars(self).items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Become an explainer of the copied model."""
        vars(self).update(state)
        self._describe()

    def _by_authors(self) -> "LeGrad":
        """Return an explainer of the same model that scores layers as the authors' package does."""
        self._follow_changes()
        other = copy.copy(self)
        other._options, other.scoring = replace(self._options, pool="authors"), self.tower.authors
        return other

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        layers: int | Literal["all"] = 2,
        pool: Literal["reference", "model"] = "reference",
        device: str | torch.device | None = None,
        precision: str = "fp32",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> "LeGrad":
        """Make a model by open_clip's own factory, and its tokenizer, and explain it.

        Code that comes with a model is never run: neither checkpoints nor configurations may name any.

        Args:
            name: open_clip model name; or `hf-hub:ORGANISATION/NAME` or `local-dir:FOLDER`, which bring their
                weights.
            pretrained: a tag, whose activation and preprocessing are followed; or the path of a checkpoint,
                which is run with the activation of the name, and with the preprocessing on which all tags of
                the name agree, else open_clip's default. None: for an address, its own weights; for a plain
                name RANDOM weights, whose maps mean nothing.
            layers: see `LeGrad`.
            pool: see `LeGrad`.
            device: None: CUDA where there is one, else CPU.
            precision: one of fp32, fp16, bf16, pure_fp16, pure_bf16, as in open_clip.
            image_size: see `LeGrad`.
            fit: see `LeGrad`.
            compile: see `LeGrad`.

        Returns:
            The explainer, with the model in evaluation mode on its device, and the model's own tokenizer.

        Raises:
            ModelLoadError: name, tag, checkpoint or precision give no model with the weights that are named;
                a file is missing, damaged or of another model, weights are not finite, or code is named.
            UnsupportedModelError: the vision tower's structure is not covered; this is found before weights
                are downloaded.
            InputError: an option does not fit the model.
        """
        loaded = load_model(name, pretrained, precision=precision, device=device)
        return cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            layers=layers,
            pool=pool,
            image_size=image_size,
            fit=fit,
            compile=compile,
        )

    @property
    def embed_dim(self) -> int:
        """Dimension of the joint image-text space."""
        return self.tower.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a square patch, in pixels."""
        return self.tower.patch_size

    @property
    def device(self) -> torch.device:
        """Where the vision tower is."""
        return self.tower.parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the vision tower takes images."""
        return self.tower.parameter().dtype

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        """Resize images to the model's input and normalise them; nothing is cropped.

        Args:
            images: of any sizes and modes; with `fit="keep"`, such that all get one input size
                (`transform.input_size` tells it).

        Returns:
            The model's input, on the model's device.

        Raises:
            InputError: the images get several input sizes.
        """
        height, width = common_input_size(self.transform, images)
        pixels = torch.empty(len(images), height, width, 3, dtype=torch.uint8)
        for row, image in zip(pixels, images, strict=True):
            row.copy_(torch.from_numpy(self.transform.resize(image)))
        return self.transform.normalise(pixels.to(self.device), self.dtype)

    def embed_text(self, texts: Sequence[str]) -> Float[Tensor, "prompts embed_dim"]:
        """Embed texts as unit rows, in order; a text longer than the context is cut as the tokenizer does.

        Raises:
            TokenizerError: the explainer was made without a tokenizer.
            InputError: the text tower is in training mode with active dropout, or one text is given where a
                list of them is expected.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        return embed_texts(self.model, tokenizer, texts, self.embed_dim, self.device)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Trace:
        """Run one forward pass.

        Args:
            images: preprocessed, in the model's dtype and on its device; any height and width that are
                multiples of the patch size.

        Returns:
            All that any number of prompts need.

        Raises:
            InputError: the images do not fit the model.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        check_images(self.tower, images)
        trace = trace_images(self.tower, images, self._layers, self.scoring)
        return replace(trace, structure=self._snapshot.identity)

    def relevance(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"],
        image_index: Int[Tensor, " prompts"] | None = None,
        *,
        per_layer: bool = False,
    ) -> Float[Tensor, "*maps grid_height grid_width"]:
        """Compute raw relevance grids: at least zero, on the patch grid, not normalised.

        Args:
            images: preprocessed images, or their trace.
            text_embeddings: [batch, prompts, embed_dim]: prompts of each image; [prompts, embed_dim]: every
                prompt for every image; the same with `image_index`: prompts of any number for each image.
                Rows of any length above zero are brought to unit length.
            image_index: for each prompt, the row of its image.
            per_layer: keep the layers apart.

        Returns:
            [batch, prompts, grid_height, grid_width], or with `image_index` [prompts, grid_height,
            grid_width]; summed over layers, or with a leading axis of layers, first to last. float32, or
            float64 for a float64 model.

        Raises:
            InputError: shapes, dtypes, devices or indices do not fit.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        # Checked first: on a GPU the check waits for what was launched before it.
        prompts = as_ragged(self._features_like(images), text_embeddings, image_index)
        trace = self._as_trace(images)
        grids = self._relevance_grids(
            self.tower,
            trace,
            prompts.unit_rows,
            prompts.image_index,
            scoring=self.scoring,
            one_by_one=prompts.one_by_one,
        )
        merged = grids if per_layer else grids.sum(dim=0)
        return merged.reshape(*merged.shape[:-3], *prompts.leading, *merged.shape[-2:])

    def heatmaps(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"],
        image_index: Int[Tensor, " prompts"] | None = None,
        *,
        neutral_embedding: Float[Tensor, "*one embed_dim"] | None = None,
        neutral_threshold: float = 0.8,
        as_authors: bool = False,
    ) -> Float[Tensor, "*maps height width"]:
        """Compute heat maps from 0 to 1 at the pixel size of the model's input.

        Args:
            images: as in `relevance`.
            text_embeddings: as in `relevance`.
            image_index: as in `relevance`.
            neutral_embedding: one embedding of a text that names nothing, such as "a photo of a"; where its
                own map is high, every prompt's map is set to zero before it is normalised. None: no
                correction.
            neutral_threshold: from 0 to 1; how high is high.
            as_authors: compute the map of the authors' package, whatever the choice of `pool`. SigLIP:
                without a `neutral_embedding` the text "a photo of a" is taken, which needs the tokenizer.
                PE-Core: tokens reach the pooler without the final norm. All other families: the default map.

        Returns:
            [batch, prompts, height, width], or with `image_index` [prompts, height, width]. A constant map is
            zeros.

        Raises:
            InputError: shapes, dtypes, devices, indices or the threshold do not fit.
            TokenizerError: `as_authors` needs a text to be embedded.
            UnsupportedModelError: the model was changed into one that cannot be explained.

        Source: `legrad_torch` 1.1, `LeWrapper.compute_legrad`.
        """
        if as_authors:
            authors = self._by_authors()
            neutral_text = authors.tower.authors_neutral_text
            if neutral_embedding is None and neutral_text is not None:
                neutral_embedding = self.embed_text([neutral_text])
            return authors.heatmaps(
                images,
                text_embeddings,
                image_index,
                neutral_embedding=neutral_embedding,
                neutral_threshold=neutral_threshold,
            )
        trace = self._as_trace(images)
        grids = self.relevance(trace, text_embeddings, image_index)
        if neutral_embedding is not None:
            neutral_grids = self.relevance(trace, neutral_embedding.reshape(1, -1))
            neutral = neutral_patches(neutral_grids, neutral_threshold)
            rows = None if image_index is None else image_index.to(neutral.device, torch.int64)
            grids = grids.masked_fill(neutral[:, None] if rows is None else neutral[rows], 0)
        height, width = trace.grid_height * self.patch_size, trace.grid_width * self.patch_size
        return heatmaps_of(grids, height, width, self.tower.normalisation)

    def similarity(
        self,
        trace: Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"],
        image_index: Int[Tensor, " prompts"] | None = None,
    ) -> Float[Tensor, "*cosines"]:
        """Compute the cosine of image and text, by the model's own image features, without a second encode.

        Args:
            trace: the encoded images.
            text_embeddings: as in `relevance`.
            image_index: as in `relevance`.

        Returns:
            [batch, prompts], or with `image_index` [prompts]; from -1 to 1.

        Raises:
            InputError: shapes, dtypes, devices or indices do not fit.
        """
        if image_index is not None:
            prompts = as_ragged(trace.image_features, text_embeddings, image_index)
            features = F.normalize(trace.image_features.to(prompts.unit_rows.dtype), dim=-1)
            return (features[prompts.image_index] * prompts.unit_rows).sum(dim=-1)
        unit_rows = as_unit_rows(trace.image_features, text_embeddings)
        features = F.normalize(trace.image_features.to(unit_rows.dtype), dim=-1)
        if unit_rows.ndim == 2:
            return features @ unit_rows.T
        return (unit_rows @ features.unsqueeze(-1)).squeeze(-1)

    def _features_like(
        self, images: Float[Tensor, "batch 3 height width"] | Trace
    ) -> Float[Tensor, "batch embed_dim"]:
        """Give a tensor of the image features' shape, dtype and device."""
        if isinstance(images, Trace):
            return images.image_features
        check_images(self.tower, images)
        return images.new_empty(len(images), self.embed_dim)

    def _as_trace(self, images: Float[Tensor, "batch 3 height width"] | Trace) -> Trace:
        if not isinstance(images, Trace):
            return self.encode(images)
        if images.structure not in (None, self._snapshot.identity):
            raise InputError(
                "trace: made of another model, or before modules of this one were replaced; encode the "
                "images again"
            )
        expected = pool_of(self.tower, self.scoring)
        # Without a pooler the layers are kept as they are, whatever they are scored by.
        if self.scoring.pooler is not None and images.pool != expected:
            raise InputError(
                f"trace: expected one made with pool={expected!r}, as this tower pools by attention, "
                f"received one made with pool={images.pool!r}"
            )
        return images


def _sized(
    transform: ImageTransform, image_size: int | tuple[int, int] | None, patch_size: int
) -> ImageTransform:
    if image_size is None:
        # Some models are configured for sizes of which their patches leave a margin unseen.
        height, width = (side - side % patch_size for side in (transform.height, transform.width))
    else:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return replace(transform, height=height, width=width)

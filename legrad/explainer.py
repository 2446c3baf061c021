"""`LeGrad`, the class that explains an open_clip model."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from legrad.errors import LeGradError
from legrad.families.faithful import Snapshot, describe_model
from legrad.heatmaps import heatmaps_of
from legrad.images import Fit, ImageTransform, Resize, transform_of
from legrad.inputs import (
    Options,
    RaggedPrompts,
    as_ragged,
    check_affinity,
    check_image_size,
    check_images,
    check_layers,
    check_pool,
    check_resize,
    check_trace,
    common_input_size,
    cosines,
    neutral_patches,
)
from legrad.loading import load_model
from legrad.memory import is_out_of_memory
from legrad.method.affinity import Affinity, spread_along_keys
from legrad.method.relevance import relevance_grids
from legrad.method.trace import Trace, trace_images
from legrad.text import embed_texts, require_tokenizer
from legrad.tokens import Tokenizer

# Derived from the model again after a deep copy or unpickling, as they hold functions of its modules.
_DERIVED = ("tower", "scoring", "_layers", "_relevance_grids", "_snapshot")


class LeGrad:
    """Compute relevance maps of an open_clip model: how much each patch of an image contributes to a text.

    The model is never changed: weights, gradient and training flags and the random state stay as they are. It
    may be in training mode; patch dropout is skipped.

    Every call explains the model in its current state. Weights may change in place. If modules, hooks or
    settings of the vision tower have changed, the tower is described again, or refused; this check takes
    about 0.15 ms per call for ViT-B/16 and 0.3 ms for ViT-L/14, on one core. An explainer can be copied,
    deep-copied and pickled; a deep copy explains the copied model.

    The default map equals that of the authors' package, except for two families. SigLIP: their package
    corrects every map by the map of the text "a photo of a". PE-Core, which it does not cover: here tokens
    pass the model's final norm before its attentional pooler. `as_authors=True` computes their map.

    Attributes:
        model: the explained model.
        tower: description of its vision tower.
        tokenizer: tokenizer that `embed_text` uses, or None.
        transform: preprocessing of images.
        scoring: how the output of a layer is compared with a text; set by `pool`.

    Source: Bousselham et al., https://arxiv.org/abs/2404.03214.

    Example:
        >>> trace = explainer.encode(explainer.preprocess([image]))
        >>> text_embeddings = explainer.embed_text(["a banana", "a panda"])
        >>> explainer.relevance(trace, text_embeddings).shape
        torch.Size([1, 2, 12, 12])
        >>> explainer.heatmaps(trace, text_embeddings).shape
        torch.Size([1, 2, 96, 96])
    """

    transform: ImageTransform

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        layers: int | Literal["all"] = 2,
        pool: Literal["reference", "model"] = "reference",
        affinity: Affinity = "none",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> None:
        """Prepare to explain a model.

        Args:
            model: an open_clip model; its vision tower decides whether it is supported.
            tokenizer: only needed by `embed_text`.
            layers: number of last blocks to explain, or "all".
            pool: how a layer is scored. "reference": as the authors do, by the mean over all tokens, or with
                the block's tokens fed directly to the attentional pooler; "model": with the model's own norm,
                pooling and head.
            affinity: "keys": the relevance of each patch becomes the mean over the patches of its image,
                weighted by the likeness of their keys in the last two blocks, see `legrad.method.affinity`.
                Costs N x N x (2 x width + prompts) multiply-adds for N patches, no attention matrix, and N
                x 2 x width numbers in the trace, which must be made by an explainer with `affinity="keys"`.
                "none": the relevance of each patch is its own.
            image_size: size of the model's input, (height, width) or one number for both, in pixels;
                multiples of the patch size. None: the model's own size, rounded down to whole patches (378
                for a model of 384 pixels with patches of 14).
            fit: "stretch" every image to that size; "keep" aspect ratios, with at most as many patches.
            compile: run the computation after the forward pass through `torch.compile`. Worth it when the
                batch shape and the number of prompts stay the same; each new shape takes about half a minute
                to compile.

        Raises:
            UnsupportedModelError: the structure of the vision tower is not covered, or the model does not
                compute what its classes define: unmerged adapters, hooks, replaced forward methods. The
                message names the module, its class and the way out.
            InputError: an option does not fit the model.

        One image of noise is encoded by the model and in closed form to check that both agree: two forward
        passes of one image, once.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._compile = compile
        self._options = Options(layers, check_pool(pool), check_affinity(affinity), image_size, fit)
        self._own_transform: ImageTransform | None = None
        self._describe()

    def _describe(self) -> None:
        """Describe the model as it is now, and resolve the options for it."""
        options, tower = self._options, describe_model(self.model)
        layers = check_layers(options.layers, tower)
        own_transform = transform_of(self.model.visual)  # type: ignore[arg-type]
        # A transform that the caller has set stays as long as the model's own does not change.
        is_same = own_transform == self._own_transform
        transform = self.transform if is_same else options.transform_for(tower, own_transform)
        check_image_size(tower, transform.height, transform.width, "preprocessing")
        self._layers, self.tower = layers, tower
        self.transform, self._own_transform = transform, own_transform
        ways = {"reference": tower.reference, "model": tower.own, "authors": tower.authors}
        self.scoring = ways[options.pool]
        self._relevance_grids = torch.compile(relevance_grids) if self._compile else relevance_grids
        self._snapshot = Snapshot.of(self.model)

    def _follow_changes(self) -> None:
        visual: Any = self.model.visual if self._snapshot.is_of(self.model) else None
        # The preprocessing is in a dict, which may have been changed in place.
        if visual is None or transform_of(visual) != self._own_transform:
            self._describe()

    @contextmanager
    def _failures_described(self) -> Iterator[None]:
        """Describe the model again after a failure: an error of its description says more."""
        try:
            yield
        except LeGradError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                self._describe()
            raise

    def __copy__(self) -> "LeGrad":
        """Return another explainer of the same model."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __getstate__(self) -> dict[str, object]:
        """Return all attributes that are not derived from the model."""
        return {name: value for name, value in vars(self).items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Describe the copied model."""
        vars(self).update(state)
        self._describe()

    def _by_authors(self) -> "LeGrad":
        """Return an explainer of the same model that scores layers as the authors' package does."""
        self._follow_changes()
        other = copy.copy(self)
        other._options = replace(self._options, pool="authors", affinity="none")
        other.scoring = self.tower.authors
        return other

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        layers: int | Literal["all"] = 2,
        pool: Literal["reference", "model"] = "reference",
        affinity: Affinity = "none",
        device: str | torch.device | None = None,
        precision: str = "fp32",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> "LeGrad":
        """Load a model and its tokenizer through open_clip and prepare to explain it.

        Code that comes with a model is never run: checkpoints and configurations that name code are refused.

        Args:
            name: open_clip model name; or `hf-hub:ORGANISATION/NAME` or `local-dir:FOLDER`, which include
                weights.
            pretrained: a tag, which also sets activation and preprocessing; or the path of a checkpoint,
                which is run with the activation of the model name, and with the preprocessing on which all
                tags of the name agree, otherwise open_clip's default. None: the included weights of a
                `hf-hub:` or `local-dir:` name; for a plain name RANDOM weights, whose maps mean nothing.
            layers: see `LeGrad`.
            pool: see `LeGrad`.
            affinity: see `LeGrad`.
            device: None: CUDA if available, otherwise CPU.
            precision: of both towers: fp32, fp16, bf16, pure_fp16 or pure_bf16, as in open_clip; or auto,
                which is bf16 on a GPU that computes it, otherwise fp32.
            image_size: see `LeGrad`.
            fit: see `LeGrad`.
            compile: see `LeGrad`.

        Returns:
            The explainer, with the model in evaluation mode on its device, and the model's own tokenizer.

        Raises:
            ModelLoadError: no model with the requested weights can be made: unknown name, tag or precision; a
                file is missing, damaged or of another model; weights are not finite; or code is named.
            UnsupportedModelError: the structure of the vision tower is not covered; this is found before
                weights are downloaded.
            InputError: an option does not fit the model.
        """
        loaded = load_model(name, pretrained, precision=precision, device=device)
        return cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            layers=layers,
            pool=pool,
            affinity=affinity,
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
        """Device of the vision tower."""
        return self.tower.parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of images that the vision tower takes."""
        return self.tower.parameter().dtype

    def preprocess(
        self, images: Sequence[Image.Image], *, resize: Resize = "exact"
    ) -> Float[Tensor, "batch 3 height width"]:
        """Resize images to the model's input and normalise them; nothing is cropped.

        Args:
            images: of any sizes and modes; with `fit="keep"`, all must get the same input size, which
                `transform.input_size` returns.
            resize: "exact": bit for bit as open_clip does, by Pillow; "fast": by the same filter in whole
                numbers, in less than half of the time, with some values off by a level of 255. Palette, alpha
                and CMYK images are always resized exactly.

        Returns:
            The model's input, on the model's device.

        Raises:
            InputError: the images get different input sizes, or `resize` is unknown.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        check_resize(resize)
        height, width = common_input_size(self.transform, images)
        pixels = torch.empty(len(images), height, width, 3, dtype=torch.uint8)
        for row, image in zip(pixels, images, strict=True):
            row.copy_(torch.from_numpy(self.transform.resize(image, resize)))
        return self.transform.normalise(pixels.to(self.device), self.dtype)

    def embed_text(self, texts: Sequence[str]) -> Float[Tensor, "prompts embed_dim"]:
        """Embed texts as unit rows, in order.

        Args:
            texts: any number of texts; the tokenizer truncates texts that exceed its context length.

        Raises:
            TokenizerError: the explainer was made without a tokenizer.
            InputError: the text tower is in training mode with active dropout, or a single string is given
                instead of a list.
        """
        return embed_texts(self.model, require_tokenizer(self.tokenizer), texts, self.embed_dim, self.device)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Trace:
        """Run one forward pass.

        Args:
            images: preprocessed, in the model's dtype and on its device; any height and width that are
                multiples of the patch size.

        Returns:
            Everything needed to explain any number of prompts without another forward pass.

        Raises:
            InputError: the images do not fit the model.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        check_images(self.tower, images)
        with self._failures_described():
            trace = trace_images(
                self.tower,
                images,
                self._layers,
                self.scoring,
                keep_keys=self._options.affinity == "keys",
            )
        return replace(trace, structure=self._snapshot.identity)

    def relevance(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | RaggedPrompts,
        image_index: Int[Tensor, " prompts"] | None = None,
        *,
        per_layer: bool = False,
    ) -> Float[Tensor, "*maps grid_height grid_width"]:
        """Compute raw relevance grids: non-negative, on the patch grid, not normalised.

        Args:
            images: preprocessed images, or their trace.
            text_embeddings: [batch, prompts, embed_dim]: the prompts of each image; [prompts, embed_dim]:
                every prompt for every image; [prompts, embed_dim] with `image_index`: any number of prompts
                for each image. Rows need not have unit length, only a length above zero. Or prompts that
                `legrad.inputs` has prepared, which are used without another check.
            image_index: for each prompt, the row of its image.
            per_layer: return one grid for each layer instead of their sum.

        Returns:
            [batch, prompts, grid_height, grid_width], or with `image_index` [prompts, grid_height,
            grid_width]; summed over layers, or with a leading axis of layers, first to last. float32, or
            float64 for a float64 model.

        Raises:
            InputError: shapes, dtypes, devices or indices do not fit.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        # Checked before the forward pass: on a GPU the check waits for all kernels launched before it.
        prompts = (
            text_embeddings
            if isinstance(text_embeddings, RaggedPrompts)
            else as_ragged(self._features_like(images), text_embeddings, image_index)
        )
        trace = self._as_trace(images)
        with self._failures_described():
            grids = self._relevance_grids(
                self.tower,
                trace,
                prompts.unit_rows,
                prompts.image_index,
                scoring=self.scoring,
                one_by_one=prompts.one_by_one,
            )
        merged = grids if per_layer else grids.sum(dim=0)
        if self._options.affinity == "keys" and trace.unit_keys is not None:
            merged = spread_along_keys(merged, trace.unit_keys, prompts.image_index)
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
            neutral_embedding: one embedding of a text that names no object, such as "a photo of a". Where the
                min-max normalised map of this text exceeds `neutral_threshold`, every prompt's grid is set to
                zero before it is normalised. None: no correction.
            neutral_threshold: threshold in [0, 1] for the neutral text's map.
            as_authors: compute the map of the authors' package, regardless of `pool` and `affinity`.
                SigLIP: without a `neutral_embedding` the text "a photo of a" is used, which needs the
                tokenizer. PE-Core: tokens enter the pooler without the final norm. All other families: the
                default map.

        Returns:
            [batch, prompts, height, width], or with `image_index` [prompts, height, width]. A constant map
            becomes zeros.

        Raises:
            InputError: shapes, dtypes, devices, indices or the threshold do not fit.
            TokenizerError: `as_authors` needs the tokenizer, and there is none.
            UnsupportedModelError: the model was changed into one that cannot be explained.

        Source: `legrad_torch` 1.1, `LeWrapper.compute_legrad`.
        """
        explainer = self._by_authors() if as_authors else self
        neutral_text = explainer.tower.authors_neutral_text if as_authors else None
        if neutral_embedding is None and neutral_text is not None:
            neutral_embedding = self.embed_text([neutral_text])
        trace = explainer._as_trace(images)
        grids = explainer.relevance(trace, text_embeddings, image_index)
        if neutral_embedding is not None:
            neutral_grids = explainer.relevance(trace, neutral_embedding.reshape(1, -1))
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
        """Compute the cosine similarity of the model's own image features and texts.

        Args:
            trace: the encoded images; nothing is encoded again.
            text_embeddings: as in `relevance`.
            image_index: as in `relevance`.

        Returns:
            [batch, prompts], or with `image_index` [prompts]; from -1 to 1.

        Raises:
            InputError: shapes, dtypes, devices or indices do not fit.
        """
        return cosines(trace.image_features, text_embeddings, image_index)

    def _features_like(
        self, images: Float[Tensor, "batch 3 height width"] | Trace
    ) -> Float[Tensor, "batch embed_dim"]:
        """Return a tensor of the image features' shape, dtype and device."""
        if isinstance(images, Trace):
            return images.image_features
        check_images(self.tower, images)
        return images.new_empty(len(images), self.embed_dim)

    def _as_trace(self, images: Float[Tensor, "batch 3 height width"] | Trace) -> Trace:
        if isinstance(images, Trace):
            return check_trace(
                images, self.tower, self.scoring, self._snapshot.identity, self._options.affinity
            )
        return self.encode(images)

"""`LeGrad`, the class that explains a model."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from legrad.arguments import ImageInput, as_index, as_model_name
from legrad.calls import Call, Part, checked_call, features_like, joined, joined_by_image
from legrad.checks import (
    Options,
    check_affinity,
    check_image_size,
    check_images,
    check_pool,
    check_resize,
    check_trace,
    require_model,
)
from legrad.classes import (
    ClassIndex,
    check_class_names,
    check_classifier,
    check_compares_texts,
    find_class,
    logits_of,
    rows_of_prompts,
)
from legrad.classifier_loading import load_classifier
from legrad.errors import LeGradError, ModelLoadError
from legrad.families import source_of, without_archive
from legrad.families.faithful import Snapshot, describe_model
from legrad.heatmaps import heatmaps_of
from legrad.images import Fit, ImageTransform, Resize, resized_batch
from legrad.inputs import (
    RaggedPrompts,
    as_ragged,
    check_neutral,
    cosines,
    neutral_patches,
)
from legrad.layers import ChosenLayers, Layers, chosen_layers, repeatable
from legrad.loading import load_model
from legrad.memory import is_out_of_memory
from legrad.method.affinity import Affinity, spread_along_keys
from legrad.method.relevance import relevance_grids
from legrad.method.trace import Trace, in_words, trace_images
from legrad.text import embed_texts, require_tokenizer
from legrad.tokens import Tokenizer
from legrad.weights.model_files import TRANSFORMERS_PREFIX

# Derived from the model again after a deep copy or unpickling, as they hold functions of its modules.
_DERIVED = ("tower", "scoring", "_layers", "_relevance_grids", "_snapshot", "_source")


class LeGrad:
    """Compute relevance maps of a model: how much each patch of an image contributes to a text or a class.

    The model is never changed: weights, gradient and training flags and the random state stay as they are. It
    may be in training mode; patch dropout is skipped.

    Every call explains the model in its current state. Weights may change in place. If modules, hooks or
    settings of the vision tower have changed, the tower is described again, or refused; this check takes
    about 0.15 ms per call for ViT-B/16 and 0.3 ms for ViT-L/14, on one core. An explainer can be copied,
    deep-copied and pickled; a deep copy explains the copied model.

    The default map equals that of the authors' package, except for two families. SigLIP: their package
    corrects every map by the map of the text "a photo of a". PE-Core, which it does not cover: here tokens
    pass the model's final norm before its attentional pooler. `as_authors=True` computes their map.

    No result is differentiable: gradients are computed in closed form, and none flows back to images or
    texts. The library's README shows relevance by autograd for those who need that.

    Attributes:
        model: the explained model.
        tower: description of its vision tower.
        tokenizer: tokenizer that `embed_text` uses, or None.
        processor: processor of a model of transformers, or None.
        class_names: name of each class of a classifier, or None.
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
        model: nn.Module | Mapping[str, Tensor],
        *,
        tokenizer: Tokenizer | None = None,
        processor: Any = None,
        class_names: Sequence[str] | None = None,
        layers: Layers = 2,
        layer_weights: Sequence[float] | None = None,
        pool: Literal["reference", "model"] = "reference",
        affinity: Affinity = "none",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> None:
        """Prepare to explain a model.

        Args:
            model: a model of open_clip; a CLIPModel, SiglipModel or Siglip2Model of transformers; a model of
                OpenAI's clip; or a vision transformer of timm or torchvision with a classifier. Its vision
                tower decides whether it is supported. Or the state (weights by name) of a model of OpenAI's
                clip, or its TorchScript archive as torch.jit.load returns it, whose state decides and whose
                code is not run: an open_clip model that shares the weights is explained.
            tokenizer: only needed by `embed_text`: of open_clip, or of transformers for its models. None:
                that of the processor; OpenAI's for its models.
            processor: processor or image processor of a model of transformers, which decides how images
                are prepared (resized without cropping). None: as usual for the family: CLIP's or SigLIP's
                mean and standard deviation, at the model's own size.
            class_names: name of each class of a classifier, which `find_class` looks up.
            layers: the blocks to explain. A number k: the last k; a list of indices, such as [6, 9] or [-1]:
                these, 0 the first block and -1 the last; or "all". The order of a list does not matter:
                results per layer are from first to last, see `layer_indices`.
            layer_weights: weights of the sum over layers: a number of at least 0 for each layer, in the order
                of the list, otherwise from first to last. Grids per layer are not weighted. None: all 1.
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
        require_model(model, tokenizer)
        self.model, tokenizer = without_archive(model, tokenizer)
        self.processor = processor
        self.class_names: tuple[str, ...] | None = None
        self._compile = compile
        self._options = Options(
            repeatable(layers),
            repeatable(layer_weights),
            check_pool(pool),
            check_affinity(affinity),
            image_size,
            fit,
        )
        self._own_transform: ImageTransform | None = None
        self._describe()
        self.tokenizer = self._source.as_tokenizer(tokenizer)
        self.class_names = check_class_names(class_names, self.tower)

    def _describe(self) -> None:
        """Describe the model as it is now, and resolve the options for it."""
        source = source_of(self.model, self.processor)
        options, tower = self._options, describe_model(source)
        layers = chosen_layers(options.layers, options.layer_weights, len(tower.blocks))
        own_transform = source.transform()
        # A transform that the caller has set stays as long as the model's own does not change.
        is_same = own_transform == self._own_transform
        transform = self.transform if is_same else options.transform_for(tower, own_transform)
        check_image_size(tower, transform.height, transform.width, "preprocessing")
        self._layers, self.tower = layers, tower
        self.transform, self._own_transform = transform, own_transform
        ways = {"reference": tower.reference, "model": tower.own, "authors": tower.authors}
        self.scoring = ways[options.pool]
        self._relevance_grids = torch.compile(relevance_grids) if self._compile else relevance_grids
        self._source, self._snapshot = source, Snapshot.of(source)

    def _follow_changes(self) -> None:
        # The preprocessing is in a dict, which may have been changed in place.
        if not self._snapshot.is_of(self.model) or self._source.transform() != self._own_transform:
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
        other._options = replace(self._options, layer_weights=None, pool="authors", affinity="none")
        other._layers, other.scoring = ChosenLayers(self.layer_indices), self.tower.authors
        return other

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        layers: Layers = 2,
        layer_weights: Sequence[float] | None = None,
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
            layer_weights: see `LeGrad`.
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
        loaded = load_model(as_model_name(name), pretrained, precision=precision, device=device)
        return cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            layers=layers,
            layer_weights=layer_weights,
            pool=pool,
            affinity=affinity,
            image_size=image_size,
            fit=fit,
            compile=compile,
        )

    @classmethod
    def from_hugging_face(
        cls,
        name: str,
        *,
        layers: Layers = 2,
        layer_weights: Sequence[float] | None = None,
        pool: Literal["reference", "model"] = "reference",
        affinity: Affinity = "none",
        device: str | torch.device | None = None,
        precision: str = "fp32",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> "LeGrad":
        """Load a CLIP or SigLIP model of transformers with its processor and prepare to explain it.

        Needs the extra `hf`: transformers. Code that comes with a model is never run, weights are read from
        safetensors files only, and weights that are missing or not used are an error.

        Args:
            name: repository on the Hugging Face hub, such as `openai/clip-vit-large-patch14`, or a folder
                that `save_pretrained` of model and processor has written.
            layers: see `LeGrad`.
            layer_weights: see `LeGrad`.
            pool: see `LeGrad`.
            affinity: see `LeGrad`.
            device: None: CUDA if available, otherwise CPU.
            precision: of all weights: fp32, fp16 or bf16; or auto, which is bf16 on a GPU that computes it,
                otherwise fp32.
            image_size: see `LeGrad`.
            fit: see `LeGrad`.
            compile: see `LeGrad`.

        Returns:
            The explainer, with the model in evaluation mode on its device, its tokenizer and image processor.

        Raises:
            ModelLoadError: there is no such model, a file is missing or damaged, weights do not belong to
                the configuration or are not finite, or a file names code.
            UnsupportedModelError: the structure of the vision tower is not covered; this is found before
                weights are downloaded.
            InputError: an option does not fit the model.
        """
        address = as_model_name(name).removeprefix(TRANSFORMERS_PREFIX)
        if not address:
            raise ModelLoadError("name: expected ORGANISATION/NAME or the path of a folder, received ''")
        loaded = load_model(f"{TRANSFORMERS_PREFIX}{address}", None, precision=precision, device=device)
        return cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            processor=loaded.processor,
            layers=layers,
            layer_weights=layer_weights,
            pool=pool,
            affinity=affinity,
            image_size=image_size,
            fit=fit,
            compile=compile,
        )

    @classmethod
    def from_classifier(
        cls,
        name: str,
        checkpoint: str | None = None,
        *,
        layers: Layers = 2,
        layer_weights: Sequence[float] | None = None,
        pool: Literal["reference", "model"] = "reference",
        affinity: Affinity = "none",
        device: str | torch.device | None = None,
        precision: str = "fp32",
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "stretch",
        compile: bool = False,
    ) -> "LeGrad":
        """Load a classifier of timm or torchvision, with the names of its classes, and prepare to explain it.

        Args:
            name: `timm:NAME.TAG` or `torchvision:NAME.WEIGHTS`, such as
                `timm:vit_base_patch16_224.augreg_in1k` or `torchvision:vit_b_16.IMAGENET1K_V1`; without a tag
                or weights, the library's default weights.
            checkpoint: path of a file with weights of this model and any number of classes, saved by
                torch.save or safetensors; no code in it is run. None: the named weights, downloaded if they
                are not in this machine's cache.
            layers: see `LeGrad`.
            layer_weights: see `LeGrad`.
            pool: see `LeGrad`.
            affinity: see `LeGrad`.
            device: None: CUDA if available, otherwise CPU.
            precision: fp32, fp16, bf16, or auto, which is bf16 on a GPU that computes it, otherwise fp32.
            image_size: see `LeGrad`.
            fit: see `LeGrad`.
            compile: see `LeGrad`.

        Returns:
            The explainer, with the model in evaluation mode on its device, and the names of its classes, if
            the library knows those of the weights.

        Raises:
            ModelLoadError: there is no such model, or its weights are missing, damaged, of another model or
                not finite.
            UnsupportedModelError: the structure of the model is not covered; this is found before weights are
                downloaded.
            InputError: an option does not fit the model.
        """
        loaded = load_classifier(as_model_name(name), checkpoint, precision=precision, device=device)
        explainer = cls(
            loaded.model,
            class_names=loaded.class_names,
            layers=layers,
            layer_weights=layer_weights,
            pool=pool,
            affinity=affinity,
            image_size=image_size,
            fit=fit,
            compile=compile,
        )
        explainer.transform = loaded.transform_like(explainer.transform)
        return explainer

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Indices of the explained blocks, from first to last; 0 is the tower's first block."""
        return self._layers.indices

    @property
    def embed_dim(self) -> int:
        """Dimension of the joint image-text space; for a classifier, the number of its classes."""
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

    def __repr__(self) -> str:
        """Return model, layers, input size, scoring, device and dtype in a line."""
        size = f"{self.transform.height} x {self.transform.width} pixels"
        blocks = f"{in_words(self.layer_indices)} of {len(self.tower.blocks)}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"LeGrad({type(self.model).__name__}, family {self.tower.family}, {blocks}, {size}, "
            f"pool {self._options.pool}, {self.device}, {dtype})"
        )

    def preprocess(
        self, images: Iterable[ImageInput], *, resize: Resize = "exact"
    ) -> Float[Tensor, "batch 3 height width"]:
        """Resize images to the model's input and normalise them; nothing is cropped.

        Args:
            images: PIL images of any modes, paths of files, or arrays, uint8 [height, width, 3] or grey, in a
                list, array, Series or generator; of any sizes. With `fit="keep"`, all must get the same input
                size, which `transform.input_size` returns. Files are turned upright by their EXIF data, PIL
                images are not. Grey of 16 bits is scaled to 8.
            resize: "exact": bit for bit as open_clip does, by Pillow; "fast": by the same filter in whole
                numbers, in less than half of the time, with some values off by a level of 255. Palette, alpha
                and CMYK images are always resized exactly.

        Returns:
            The model's input, on the model's device.

        Raises:
            ImageFileError: a file is no image of a format that is read, or damaged.
            InputError: an element is no image, the images get different input sizes, or `resize` is unknown.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        check_resize(resize)
        pixels = resized_batch(images, self.transform, resize)
        return self.transform.normalise(pixels.to(self.device), self.dtype)

    def embed_text(self, texts: Iterable[str]) -> Float[Tensor, "prompts embed_dim"]:
        """Embed texts as unit rows, in order.

        Args:
            texts: any number of texts, in a list, array, Series or generator; the tokenizer truncates texts
                that exceed its context length.

        Raises:
            TokenizerError: the explainer was made without a tokenizer.
            InputError: an element is no text, a single string is given instead of a list, or the text tower
                is in training mode with active dropout.
        """
        check_compares_texts(self.tower, "embed_text")
        return embed_texts(self.model, require_tokenizer(self.tokenizer), texts, self.embed_dim, self.device)

    def encode(self, images: Float[Tensor, "batch 3 height width"], *, check_pixels: bool = True) -> Trace:
        """Run one forward pass.

        Args:
            images: preprocessed, in the model's dtype and on its device; any height and width that are
                multiples of the patch size.
            check_pixels: refuse NaN and infinite pixels, for which a GPU is waited for.

        Returns:
            Everything needed to explain any number of prompts without another forward pass.

        Raises:
            InputError: the images do not fit the model.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        check_images(self.tower, images, check_pixels=check_pixels)
        with self._failures_described():
            trace = trace_images(
                self.tower,
                images,
                self.layer_indices,
                self.scoring,
                keep_keys=self._options.affinity == "keys",
            )
        return replace(trace, structure=self._snapshot.identity)

    def relevance(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | RaggedPrompts | None = None,
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
        *,
        class_index: ClassIndex | None = None,
        per_layer: bool = False,
        memory_budget_bytes: int | None = None,
    ) -> Float[Tensor, "*maps grid_height grid_width"]:
        """Compute raw relevance grids: non-negative, on the patch grid, not normalised, not differentiable.

        Args:
            images: preprocessed images, or their trace, which may hold more layers than are explained.
            text_embeddings: [batch, prompts, embed_dim]: the prompts of each image; [prompts, embed_dim]:
                every prompt for every image; [prompts, embed_dim] with `image_index`: any number of prompts
                for each image. Rows need not have unit length, only a length above zero. Or prompts that
                `legrad.inputs` has prepared, which are used without another check, all at once.
            image_index: for each prompt, the row of its image.
            class_index: of a classifier, which takes it instead of text embeddings: one class; [classes]:
                every class for every image; [batch, classes]: the classes of each image; or [classes] with
                `image_index`. The relevance is that for the logit of the class.
            per_layer: return one grid for each layer, without `layer_weights`, instead of their sum.
            memory_budget_bytes: bound on the memory that the call takes beside its arguments and its result:
                images are encoded and prompts are computed in parts that fit, by an estimate from the
                tower's shapes; a part has at least one image and one prompt. None: 512 MiB on a CPU, 8 GiB
                on a GPU.

        Returns:
            [batch, prompts, grid_height, grid_width], or with `image_index` [prompts, grid_height,
            grid_width]; summed over layers, or with a leading axis of layers, first to last. float32, or
            float64 for a float64 model.

        Raises:
            InputError: shapes, dtypes, devices or indices do not fit.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        self._follow_changes()
        if isinstance(text_embeddings, RaggedPrompts):
            return self._grids(self._as_trace(images), text_embeddings, per_layer, memory_budget_bytes)
        call = self._call(
            images,
            text_embeddings,
            image_index,
            class_index=class_index,
            memory_budget_bytes=memory_budget_bytes,
        )
        pieces = (
            (part, self._grids(trace, part.prompts, per_layer, call.steps.step_bytes))
            for rows in call.images_of_parts()
            for trace in [self._as_trace(call.images_at(rows))]
            for part in call.parts(rows, trace)
        )
        return joined(call, pieces)

    def _grids(
        self, trace: Trace, prompts: RaggedPrompts, per_layer: bool, step_bytes: int | None
    ) -> Float[Tensor, "*maps grid_height grid_width"]:
        with self._failures_described():
            grids = self._relevance_grids(
                self.tower,
                trace,
                prompts.unit_rows,
                prompts.image_index,
                scoring=self.scoring,
                one_by_one=prompts.one_by_one,
                memory_budget_bytes=step_bytes,
            )
        merged = grids if per_layer else self._layers.merged(grids)
        if self._options.affinity == "keys" and trace.unit_keys is not None:
            merged = spread_along_keys(merged, trace.unit_keys, prompts.image_index, strip_bytes=step_bytes)
        return merged.reshape(*merged.shape[:-3], *prompts.leading, *merged.shape[-2:])

    @overload
    def heatmaps(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | None = None,
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
        *,
        class_index: ClassIndex | None = None,
        neutral_embedding: Float[Tensor, "*one embed_dim"] | None = None,
        neutral_threshold: float = 0.8,
        as_authors: bool = False,
        output_size: tuple[int, int] | None = None,
        memory_budget_bytes: int | None = None,
    ) -> Float[Tensor, "*maps height width"]: ...

    @overload
    def heatmaps(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | None = None,
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
        *,
        class_index: ClassIndex | None = None,
        neutral_embedding: Float[Tensor, "*one embed_dim"] | None = None,
        neutral_threshold: float = 0.8,
        as_authors: bool = False,
        output_size: Sequence[tuple[int, int]],
        memory_budget_bytes: int | None = None,
    ) -> list[Float[Tensor, "_prompts _height _width"]]: ...

    def heatmaps(
        self,
        images: Float[Tensor, "batch 3 _height _width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | None = None,
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
        *,
        class_index: ClassIndex | None = None,
        neutral_embedding: Float[Tensor, "*one embed_dim"] | None = None,
        neutral_threshold: float = 0.8,
        as_authors: bool = False,
        output_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        memory_budget_bytes: int | None = None,
    ) -> Float[Tensor, "*maps height width"] | list[Float[Tensor, "_prompts _height _width"]]:
        """Compute heat maps from 0 to 1 at the pixel size of the model's input, or of the original images.

        Args:
            images: as in `relevance`.
            text_embeddings: as in `relevance`.
            image_index: as in `relevance`.
            class_index: as in `relevance`.
            neutral_embedding: one embedding of a text that names no object, such as "a photo of a". Where the
                min-max normalised map of this text exceeds `neutral_threshold`, every prompt's grid is set to
                zero before it is normalised. None: no correction.
            neutral_threshold: threshold in [0, 1] for the neutral text's map.
            as_authors: compute the map of the authors' package, regardless of `pool`, `affinity` and
                `layer_weights`. SigLIP: without a `neutral_embedding` the text "a photo of a" is used, which
                needs the tokenizer. PE-Core: tokens enter the pooler without the final norm. All other
                families: the default map.
            output_size: (height, width) in pixels of all maps, or one for each image: those of the original
                images, as nothing is cropped or padded. PIL's `image.size` is (width, height). None: the size
                of the model's input.
            memory_budget_bytes: as in `relevance`; maps in several copies, before they are normalised, count.

        Returns:
            [batch, prompts, height, width], or with `image_index` [prompts, height, width]. With a size for
            each image a list: for each image the maps of its prompts, [prompts, height, width]. A constant
            map becomes zeros.

        Raises:
            InputError: shapes, dtypes, devices, indices, sizes or the threshold do not fit.
            TokenizerError: `as_authors` needs the tokenizer, and there is none.
            UnsupportedModelError: the model was changed into one that cannot be explained.

        Source: `legrad_torch` 1.1, `LeWrapper.compute_legrad`.
        """
        self._follow_changes()
        explainer = self._by_authors() if as_authors else self
        neutral_text = explainer.tower.authors_neutral_text if as_authors else None
        if neutral_embedding is None and neutral_text is not None:
            neutral_embedding = self.embed_text([neutral_text])
        if neutral_embedding is not None:
            check_compares_texts(self.tower, "neutral_embedding")
        neutral_row, threshold = check_neutral(neutral_embedding, neutral_threshold, self.embed_dim)
        call = explainer._call(
            images,
            text_embeddings,
            image_index,
            class_index=class_index,
            memory_budget_bytes=memory_budget_bytes,
            output_size=output_size,
            is_of_maps=True,
        )
        pieces = explainer._corrected_grids(call, neutral_row, threshold)
        normalisation = self.tower.normalisation
        if isinstance(call.map_sizes, list):
            return joined_by_image(call, pieces, call.map_sizes, normalisation)
        height, width = call.map_sizes
        return joined(
            call, ((part, heatmaps_of(grids, height, width, normalisation)) for part, grids in pieces)
        )

    def _corrected_grids(
        self, call: Call, neutral_row: Float[Tensor, "1 embed_dim"] | None, threshold: float
    ) -> Iterator[tuple[Part, Float[Tensor, "*maps grid_height grid_width"]]]:
        """Yield the grids of each part, zero where the neutral text's map is high."""
        for images_of_part in call.images_of_parts():
            trace = self._as_trace(call.images_at(images_of_part))
            neutral = None
            if neutral_row is not None:
                prompts = as_ragged(trace.image_features, neutral_row, None)
                grids = self.relevance(trace, prompts, memory_budget_bytes=call.steps.step_bytes)
                neutral = neutral_patches(grids, threshold)
            for part in call.parts(images_of_part, trace):
                grids = self.relevance(trace, part.prompts, memory_budget_bytes=call.steps.step_bytes)
                if neutral is not None:
                    grids = grids.masked_fill(neutral[part.prompts.image_index].view_as(grids), 0)
                yield part, grids

    def similarity(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"],
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
    ) -> Float[Tensor, "*cosines"]:
        """Compute the cosine similarity of the model's own image features and texts; not differentiable.

        Args:
            images: preprocessed images, or their trace, with which nothing is encoded again.
            text_embeddings: as in `relevance`.
            image_index: as in `relevance`.

        Returns:
            [batch, prompts], or with `image_index` [prompts]; from -1 to 1.

        Raises:
            InputError: shapes, dtypes, devices or indices do not fit.
            UnsupportedModelError: the model was changed into one that cannot be explained.
        """
        check_compares_texts(self.tower, "similarity")
        if isinstance(images, Trace):
            return cosines(images.image_features, text_embeddings, image_index)
        self._follow_changes()
        call = self._call(images, text_embeddings, image_index)
        features = [self._as_trace(images[rows]).image_features for rows in call.images_of_parts()]
        return cosines(torch.cat(features), text_embeddings, call.image_index)

    def logits(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        class_index: ClassIndex | None = None,
        image_index: Int[Tensor, " classes"] | Sequence[int] | None = None,
    ) -> Float[Tensor, "*logits"]:
        """Return a classifier's own logits; their softmax gives the probabilities of its classes.

        Args:
            images: as in `relevance`.
            class_index: as in `relevance`; None: all classes.
            image_index: as in `relevance`.

        Returns:
            [batch, classes], or with `image_index` [classes].

        Raises:
            InputError: the model is no classifier, or shapes, dtypes, devices or indices do not fit.
        """
        self._follow_changes()
        check_classifier(self.tower, "logits")
        trace = self._as_trace(images) if isinstance(images, Trace) else self.encode(images)
        return logits_of(trace.image_features, class_index, as_index(image_index))

    def find_class(self, name: str | int) -> int:
        """Return the index of a class of a classifier, given its name in `class_names`, or its index.

        Args:
            name: the name, or one of the synonyms that it lists between commas, in upper or lower case; or
                an index, also in digits.

        Raises:
            InputError: the model is no classifier, or no class or several classes have this name; the message
                lists the nearest ones.
        """
        check_classifier(self.tower, "find_class")
        return find_class(name, self.embed_dim, self.class_names)

    def _call(
        self,
        images: Float[Tensor, "batch 3 height width"] | Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | None,
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None,
        *,
        class_index: ClassIndex | None = None,
        **options: Any,
    ) -> Call:
        """Check all arguments before a forward pass: on a GPU this waits for kernels launched before it."""
        if isinstance(images, Trace):
            images = self._as_trace(images)
        else:
            check_images(self.tower, images)
        features = features_like(self.tower, images)
        image_index = as_index(image_index)
        return checked_call(
            self.tower,
            self.scoring,
            images,
            rows_of_prompts(self.tower, features, text_embeddings, class_index, image_index),
            image_index,
            layers=len(self.layer_indices),
            **options,
        )

    def _as_trace(self, images: Float[Tensor, "batch 3 height width"] | Trace) -> Trace:
        """Return the trace of images, whose pixels have been checked."""
        if isinstance(images, Trace):
            return check_trace(
                images,
                self.tower,
                self.scoring,
                structure=self._snapshot.identity,
                layers=self.layer_indices,
                affinity=self._options.affinity,
            )
        return self.encode(images, check_pixels=False)

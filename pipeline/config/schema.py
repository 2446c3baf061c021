"""The sections of a job's configuration: every key with its default and what it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.config.classes import ClassEntry, Template, class_entries, one_line

MEBIBYTE = 1 << 20
# Names of models that are addresses: of a repository on a hub, or of a folder.
ADDRESS_PREFIXES = ("hf-hub:", "local-dir:")
# of any key; a float holds every integer up to here
LARGEST_NUMBER = 2**53
# threads wait for at most about 300 years
LONGEST_WAIT_S = 10**9
# what would be made at once, such as threads
MANY = 2**16

Count = Annotated[int, Field(ge=1, le=MANY)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Section(BaseModel):
    """Settings that refuse unknown keys and never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_another_value(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts true as 1
        if cls.model_fields[str(info.field_name)].annotation is not bool and _any(value, bool):
            raise ValueError("expected another value than true or false; a text in quotes is one")
        return value

    @field_validator("*")
    @classmethod
    def _numbers_of_a_size_that_has_a_use(cls, value: Any) -> Any:
        if _any(value, (int, float), lambda number: abs(number) > LARGEST_NUMBER):
            raise ValueError(f"expected at most {LARGEST_NUMBER}")
        return value


def _any(value: Any, kind: type | tuple[type, ...], holds: Callable[[Any], bool] = lambda _: True) -> bool:
    """Whether a value, or one of a list of them, is of a kind for which something holds."""
    items = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, kind) and holds(item) for item in items)


def _fields(spec: str) -> str:
    """Check a field of samples, such as jpg;png or json:NAME."""
    extensions, colon, name = spec.partition(":")
    if not all(extension.strip() for extension in extensions.split(";")) or (colon and not name):
        raise ValueError("expected names of fields with semicolons between them, or json:NAME")
    return spec


def _filled_line(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text that is not empty")
    return one_line(text)


FieldSpec = Annotated[str, AfterValidator(_fields)]
Line = Annotated[str, AfterValidator(_filled_line)]


class InputConfig(Section):
    """Where samples come from and which of their fields are read."""

    shards: Line | Annotated[list[Line], Field(min_length=1)] = Field(
        description="One pattern or a list: braces, globs, @file; local paths, s3://, gs://, http(s)://."
    )
    image: FieldSpec = Field(
        "jpg;jpeg;png;webp", description="Field of the image; the first one present counts."
    )
    caption: FieldSpec = Field(
        "txt", description="Field of the caption: txt, or json:NAME for a key of a JSON field."
    )
    max_image_pixels: PositiveInt = Field(
        100_000_000,
        description="Larger images become error rows, told from the header. A decode thread takes up to "
        "20 bytes a pixel to decode an image, and again to mask it.",
    )
    max_member_bytes: PositiveInt = Field(64 * MEBIBYTE, description="Larger members become error rows.")
    allow_commands: bool = Field(
        False,
        description="Whether a shard may be pipe:COMMAND, which is run on the worker, without a shell, and "
        "writes the tar.",
    )


class ModelConfig(Section):
    """Which model explains the samples, and how."""

    name: Line = Field(
        description="Name of an open_clip model (`legrad models` lists them), or hf-hub:ORGANISATION/NAME or "
        "local-dir:FOLDER, which bring their own weights."
    )
    pretrained: Line | None = Field(
        None,
        validate_default=True,
        description="Hub tag, path of a local checkpoint, or demo; null, or left out, for names that bring "
        "their own weights.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of weights and activations."
    )
    layers: Count | Literal["all"] = Field(
        2, description="How many of the last blocks are explained, or all."
    )
    image_size: Count | tuple[Count, Count] | None = Field(
        None, description="Model input in pixels: side, or [height, width]; null: the model's own."
    )
    fit: Literal["stretch", "keep", "tile"] = Field(
        "stretch",
        description="How an image, never cropped, fills the input. stretch: to the input size; keep: in its "
        "own aspect ratio, with at most as many patches; tile: as stretch, and large images also in windows "
        "(views.tile_*).",
    )

    @field_validator("pretrained")
    @classmethod
    def _weights_named_once(cls, pretrained: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if name is None:
            return pretrained
        if name.startswith(ADDRESS_PREFIXES) and pretrained is not None:
            raise ValueError(f"must be null, as {name} brings its own weights")
        if not name.startswith(ADDRESS_PREFIXES) and not pretrained:
            raise ValueError(
                f"required, as {name} brings no weights: a tag, the path of a checkpoint, or demo"
            )
        return pretrained


class ViewsConfig(Section):
    """Further views of an image, whose raw maps are averaged on one grid; a forward pass for each."""

    flip: bool = Field(False, description="Every view also mirrored left to right.")
    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] = Field(
        (1.0,),
        min_length=1,
        max_length=8,
        description="The whole image at these multiples of the model's input, rounded to whole patches. "
        "Similarity is told at the first one; maps have the grid of the finest view.",
    )
    tile_zoom: float = Field(
        2.0,
        ge=1,
        le=8,
        description="model.fit tile: how many windows the image's shorter side is long; never more than its "
        "own pixels fill.",
    )
    tile_overlap: float = Field(
        0.25, ge=0, le=0.9, description="Least share of a window that the next one repeats."
    )
    max_tiles: int = Field(
        16, ge=1, le=256, description="Most windows of an image; one that needs more is seen from farther."
    )

    @field_validator("scales")
    @classmethod
    def _differ(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) < len(scales):
            raise ValueError("the scales must differ")
        return scales


class PromptsConfig(Section):
    """Which texts are explained for a sample."""

    source: Literal["caption", "captions", "classes"] = Field(
        "caption",
        description="caption: the whole text. captions: every element of a JSON list. classes: the names in "
        "prompts.classes.",
    )
    max_per_sample: PositiveInt = Field(
        32,
        description="Where a sample has more, the most similar are kept and the others counted; of equally "
        "similar ones the first.",
    )
    classes: Line | tuple[ClassEntry, ...] | None = Field(
        None,
        description="Path or URL of the classes: .txt, whose line i names class i, or a .yaml list of name, "
        "id, synonyms, plurals, templates; or such a list itself.",
    )
    mentioned_in: FieldSpec | None = Field(
        None,
        description="Of the classes only those whose name, synonym or plural this field mentions: txt, or "
        "json:NAME for a text or a list of texts; null: all.",
    )
    templates: Literal["openai-imagenet", "simple-imagenet"] | tuple[Template, ...] = Field(
        ("{}",),
        min_length=1,
        description="Texts with {} in place of the prompt, whose unit embeddings are averaged, as "
        "open_clip's zero-shot classifier does; by name: open_clip's own lists of 80 and of 7.",
    )
    embed_synonyms: bool = Field(
        False,
        description="Whether a class's synonyms are averaged into its embedding; otherwise they only help to "
        "find mentions.",
    )
    background: Literal["none", "default"] | tuple[Text, ...] = Field(
        "none",
        description="Texts that compete with the prompts for pixels: a shipped list, or your own; those that "
        "name one of the classes are left out; of texts whose embeddings are equal but for rounding the "
        "first stands for all.",
    )
    max_background: PositiveInt = Field(
        4, description="Of the background texts the most similar to an image get a map."
    )
    neutral: Text | None = Field(
        None,
        description="A text that names nothing, such as a photo of a: where its own map is high, maps are "
        "zeroed before they are normalised.",
    )
    neutral_threshold: float = Field(0.8, ge=0, le=1, description="How high, in [0, 1], is high.")

    @field_validator("classes", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        return class_entries(value) if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _classes_have_names(self) -> PromptsConfig:
        if self.source == "classes" and self.classes is None:
            raise ValueError("prompts.source classes needs prompts.classes, the classes' file")
        for key in ("classes", "mentioned_in"):
            if self.source != "classes" and getattr(self, key) is not None:
                raise ValueError(f"prompts.{key} belongs to prompts.source classes, not to {self.source}")
        return self


class MasksConfig(Section):
    """How a heat map becomes a mask."""

    rule: Literal["fixed", "otsu", "quantile", "band"] = Field(
        "fixed",
        description="Threshold of the heat map in [0, 1]. fixed: value; otsu: found for each map; quantile: "
        "so that a share of the pixels is left outside; band: above high foreground, up to low background, "
        "and between them the ignore mask.",
    )
    value: float = Field(0.5, ge=0, le=1, description="The threshold of rule fixed.")
    quantile: float = Field(
        0.8, ge=0, le=1, description="Share of the pixels that rule quantile leaves outside."
    )
    low: float = Field(0.25, ge=0, le=1, description="Lower threshold of rule band.")
    high: float = Field(
        0.75, ge=0, le=1, validate_default=True, description="Upper threshold of rule band, above low."
    )
    band_center: Literal["half", "otsu"] = Field(
        "half",
        description="half: low and high are values of the heat map. otsu: the scale of low and high is bent "
        "so that each map's own Otsu threshold stands at 0.5.",
    )
    combine: Literal["independent", "argmax"] = Field(
        "independent",
        description="independent: each prompt by itself, masks may overlap. argmax: the prompts of an image "
        "and its background compete for each pixel; the background's level is the threshold of the rule.",
    )
    refine: Literal["none", "pamr", "par"] = Field(
        "par",
        description="Whether heat maps are made to follow the image's edges, at the model's input size: par "
        "as Ru et al. (2022), pamr as Araslanov and Roth (2020).",
    )
    refine_iterations: Count = Field(
        8, description="How often each pixel becomes the weighted mean of its neighbours."
    )
    refine_dilations: list[Count] | None = Field(
        None,
        min_length=1,
        max_length=12,
        description="Steps to eight neighbours each, in pixels of the model's input; null: a quarter of a "
        "patch, half, one and two.",
    )
    refine_contrast: float | None = Field(
        None,
        gt=0,
        description="Share of the neighbours' deviation that counts as one unit of colour distance; smaller: "
        "sharper; null: the authors' own, 0.3 for par, 0.1 for pamr.",
    )
    max_side: Count | None = Field(
        None, description="Longest side of the mask frame in pixels; null: the image's original size."
    )
    min_similarity: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Prompts with a smaller cosine are rejected_similarity. What falls short of this, of "
        "min_peak or min_contrast by a rounding error (1e-5) is accepted.",
    )
    min_peak: float | None = Field(
        None, ge=0, description="Raw maps with a smaller maximum are rejected_peak."
    )
    min_area: float | None = Field(
        None, ge=0, le=1, description="Masks that cover a smaller share of the frame are rejected_area."
    )
    min_contrast: float | None = Field(
        None,
        ge=0,
        description="Raw maps that stand out less, in the unit of peak, are rejected_contrast: the mean "
        "above the map's own Otsu threshold less the mean below.",
    )
    smooth: float = Field(
        0.0, ge=0, le=100, description="Standard deviation in patches of a Gaussian that smooths heat maps."
    )
    min_component: float = Field(
        0.0, ge=0, le=1, description="Parts of a mask below this share of the frame are dropped."
    )
    max_hole: float = Field(
        0.0, ge=0, le=1, description="Holes in a mask up to this share of the frame are filled."
    )

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("low")
        if low is not None and not low < high:
            raise ValueError(f"must be above masks.low, which is {low}")
        return high

    @field_validator("refine_dilations")
    @classmethod
    def _different_steps(cls, steps: list[int] | None) -> list[int] | None:
        if steps is not None and len(set(steps)) < len(steps):
            raise ValueError("expected different steps")
        return steps


class OutputConfig(Section):
    """Where results go and what they hold."""

    dir: Line = Field(description="Output folder: local path, s3:// or gs://.")
    heatmap: bool = Field(False, description="Also store each relevance grid as uint8.")
    rows: Literal["all", "accepted"] | None = Field(
        None,
        description="all: rejected prompts keep a row without mask; null: accepted where prompts.source is "
        "classes, all otherwise.",
    )
    on_mismatch: Literal["refuse", "overwrite"] = Field(
        "refuse", description="What to do where the folder holds results of another configuration."
    )

    @field_validator("dir")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        if "@" in urlsplit(url).netloc:
            raise ValueError("credentials come from the environment, never from a URL")
        return url


class RunConfig(Section):
    """How the work is spread; changes nothing of the results."""

    workers: Count | None = Field(
        None, description="Ray actors; null: as many as the cluster's devices allow."
    )
    gpus_per_worker: float = Field(1, ge=0, le=MANY, description="GPUs of one worker; 0: CPU workers.")
    cpus_per_worker: Count | None = Field(
        None, description="CPU cores of one worker; null: the cluster's cores shared out, at most 8."
    )
    batch_size: Count | Literal["auto"] = Field(
        32,
        description="Images of one forward pass. auto: on a GPU found by trying when a worker starts, on a "
        "CPU 8. A batch too large for the device's memory is halved in any case.",
    )
    lookahead_bytes: PositiveInt = Field(
        512 * MEBIBYTE,
        description="Bytes of samples that one worker holds at a time, as read and as the model takes them.",
    )
    decode_threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Threads of one worker; null: its CPU cores."
    )
    max_attempts: Count = Field(3, description="Attempts at a shard before it is given up.")
    retry_failed: bool = Field(True, description="Whether a rerun tries given-up shards again.")
    retry_damaged: bool = Field(
        False,
        description="Whether a rerun reads damaged shards again though they have not changed; changed ones "
        "are always read again.",
    )
    accept_damaged: bool = Field(
        False,
        description="Whether a job is complete though some of its shards are damaged: cut, corrupt, "
        "compressed or no archives; their intact samples are annotated in any case.",
    )
    check_inputs: bool = Field(
        True,
        description="Whether each shard on a web server is asked for its size, ETag and date when a job "
        "starts, so that a replaced shard is annotated again.",
    )
    error_budget: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2,
        description="Share of failed samples above which a job is not complete. It stops a job early once "
        "1000 samples are done, and is looked at again at the end.",
    )
    max_failed_shards: int | None = Field(
        None, ge=0, description="More shards given up than this stop the job; null: no limit."
    )
    stall_timeout_s: float | None = Field(
        1800.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="A worker that finishes no sample for so many seconds is replaced; null: never.",
    )
    progress_interval_s: float = Field(
        10.0, gt=0, le=LONGEST_WAIT_S, description="Seconds between two progress lines in a log."
    )


class JobConfig(Section):
    """A whole job."""

    input: InputConfig
    model: ModelConfig
    views: ViewsConfig = ViewsConfig()
    prompts: PromptsConfig = PromptsConfig()
    masks: MasksConfig = MasksConfig()
    output: OutputConfig
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _captions_need_json(self) -> JobConfig:
        if self.prompts.source == "captions" and not self.input.caption.startswith("json:"):
            raise ValueError(
                f"prompts.source captions reads a list from a JSON field: input.caption must be json:NAME, "
                f"got {self.input.caption!r}"
            )
        return self

    @property
    def rows_written(self) -> Literal["all", "accepted"]:
        """Which rows are written: `output.rows`, or what null stands for."""
        return self.output.rows or ("accepted" if self.prompts.source == "classes" else "all")

"""The configuration of a job: its sections, and each key with its type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from pipeline.config.classes import ClassEntry, Template, class_entries
from pipeline.config.marks import Keep, MarkEntry
from pipeline.config.masks import MasksConfig
from pipeline.config.section import Count, FieldSpec, Line, Section, Text
from pipeline.storage import MIN_READ_BYTES_PER_S

MEBIBYTE = 1 << 20
# names of models that are addresses: of a repository on a hub, or of a folder
ADDRESS_PREFIXES = ("hf-hub:", "local-dir:", "hf:")
# Of models that `legrad explain` takes and a job refuses, see `pipeline.annotate.architecture`.
CLASSIFIER_PREFIXES = ("timm:", "torchvision:")
# name of the bundled weights, in place of a tag
DEMO = "demo"
SMALLEST_GPU_SHARE = 0.01
# a thread can wait for at most about 300 years
LONGEST_WAIT_S = 10**9
# chosen on the demo's heldout set, confirmed on newartist: tests/bench/README.md
DEFAULT_CONTRAST = 0.6


class InputConfig(Section):
    """Where the samples come from, and which of their fields are read."""

    shards: Line | Annotated[list[Line], Field(min_length=1)] = Field(
        description="One pattern of shards or a list of them: braces, globs, @FILE; local paths, s3://, "
        "gs://, http(s)://."
    )
    maps: Line | None = Field(
        None,
        description="Output folder whose stored maps take the place of a model: `legrad remask` sets it, and "
        "`legrad annotate` refuses it.",
    )
    image: FieldSpec = Field(
        "jpg;jpeg;png;webp",
        description="Field that holds the image; of several names, the first one that is present.",
    )
    caption: FieldSpec = Field(
        "txt", description="Field that holds the caption: txt, or json:NAME for a key of a JSON field."
    )
    max_image_pixels: PositiveInt = Field(
        100_000_000,
        description="Largest image in pixels. Larger ones, recognised by their header, become error rows. "
        "Decoding takes up to 20 bytes a pixel, and masking an image as much again.",
    )
    resize: Literal["exact", "fast"] = Field(
        "fast",
        description="How images are decoded and resized to the model's input. exact: bit for bit as "
        "open_clip does. fast: in less than half of the time, with the same filter; some levels of "
        "colour differ by one or two, and large JPEGs are reduced while they are decoded (see "
        "tests/bench/README.md).",
    )
    max_member_bytes: PositiveInt = Field(
        64 * MEBIBYTE, description="Largest member of a shard in bytes; larger ones become error rows."
    )
    allow_commands: bool = Field(
        False,
        description="Whether a shard may be pipe:COMMAND: a command that the worker runs, without a shell, "
        "and that writes the tar to its standard output.",
    )


class ModelConfig(Section):
    """Which model explains the samples, and how."""

    name: Line = Field(
        description="Name of an open_clip model (`legrad models` lists them); or hf-hub:ORGANISATION/NAME or "
        "local-dir:FOLDER for other models of open_clip, or hf:ORGANISATION/NAME or hf:./FOLDER for CLIP and "
        "SigLIP models of Hugging Face transformers, which bring their own weights."
    )
    pretrained: Line | None = Field(
        None,
        validate_default=True,
        description="Pretrained tag, path of a local checkpoint, or demo for the bundled model; null for "
        "names that bring their own weights.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of the weights and activations of both towers, image and text. auto: bf16 on "
        "GPUs that compute it, otherwise fp32; decided once a job, recorded in job.json, and kept by later "
        "runs into the same folder. tests/bench/README.md says how rows in bf16 differ from rows in fp32.",
    )
    layers: Count | Literal["all"] = Field(
        2, description="Number of last transformer blocks whose relevance is added up, or all."
    )
    affinity: Literal["none", "keys"] = Field(
        "none",
        description="Whether relevance is spread over the patches of an image that look alike to the model. "
        "keys: the relevance of a patch becomes the mean over all patches, weighted by the likeness of their "
        "keys in the last blocks.",
    )
    image_size: Count | tuple[Count, Count] | None = Field(
        None,
        description="Size of the model's input in pixels: side, or [height, width]; null: the model's own.",
    )
    fit: Literal["stretch", "keep", "tile"] = Field(
        "stretch",
        description="How an image fills the model's input; it is never cropped. stretch: stretched to the "
        "input size. keep: in its own aspect ratio, with at most as many patches. tile: as stretch, and "
        "large images also in windows (see views.tile_zoom, views.tile_overlap, views.max_tiles).",
    )

    @field_validator("pretrained")
    @classmethod
    def _weights_named_once(cls, pretrained: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if name is None:
            return pretrained
        if name.startswith(ADDRESS_PREFIXES) and pretrained is not None:
            raise ValueError(f"must be null, because {name} brings its own weights")
        if not name.startswith((*ADDRESS_PREFIXES, *CLASSIFIER_PREFIXES)) and not pretrained:
            raise ValueError(
                f"required, because {name} brings no weights: a tag, a checkpoint's path, or demo"
            )
        return pretrained


class ViewsConfig(Section):
    """Further views of an image, whose raw maps are averaged; each view costs a forward pass."""

    flip: bool = Field(False, description="Whether every view is also taken mirrored left to right.")
    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] = Field(
        (1.0,),
        min_length=1,
        max_length=8,
        description="Sizes at which the whole image is viewed, as multiples of the model's input, rounded to "
        "whole patches. The similarity is that of the first one; maps have the grid of the finest view.",
    )
    tile_zoom: float = Field(
        2.0,
        ge=1,
        le=8,
        description="With model.fit tile: length of the image's shorter side in windows; images are never "
        "enlarged for it.",
    )
    tile_overlap: float = Field(
        0.25, ge=0, le=0.9, description="Smallest share of a window that the next window overlaps."
    )
    max_tiles: int = Field(
        16,
        ge=1,
        le=256,
        description="Largest number of windows of an image; an image that needs more is downscaled to fit.",
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
        description="Where a sample's prompts come from. caption: the whole caption is one prompt. captions: "
        "every element of a JSON list is one. classes: the names in prompts.classes.",
    )
    max_per_sample: PositiveInt = Field(
        32,
        description="Largest number of prompts of a sample. Of more, those most similar to the image are "
        "explained (of equally similar ones the first) and the others are counted.",
    )
    classes: Line | tuple[ClassEntry, ...] | None = Field(
        None,
        description="Path or URL of the classes file: .txt, whose line i names class i, or .yaml, a list of "
        "name, id, synonyms, plurals, templates; or such a list itself.",
    )
    mentioned_in: FieldSpec | None = Field(
        None,
        description="Field of a sample that selects its classes: those whose name, synonym or plural it "
        "mentions. txt, or json:NAME for a text or a list of texts; null: all classes.",
    )
    templates: Literal["openai-imagenet", "simple-imagenet"] | tuple[Template, ...] = Field(
        ("{}",),
        min_length=1,
        description="Texts with {} in place of the prompt, whose unit embeddings are averaged, as in "
        "open_clip's zero-shot classifier; or the name of one of open_clip's lists, of 80 or of 7.",
    )
    embed_synonyms: bool = Field(
        False,
        description="Whether the synonyms of a class are averaged into its embedding; otherwise they only "
        "help to find mentions.",
    )
    background: Literal["none", "default"] | tuple[Text, ...] = Field(
        "none",
        description="Texts of what is usually behind things. They take relevance from the prompts by "
        "masks.contrast; where that is 0, they compete with them for pixels under masks.combine argmax. They "
        "count for masks.min_lead. none; default: the list in the package; or your own list. Texts that name "
        "one of the classes are skipped; of texts with equal embeddings, the first one is taken.",
    )
    max_background: PositiveInt = Field(
        4,
        description="Largest number of background texts of an image: those most similar to it get a map.",
    )
    neutral: Text | None = Field(
        None,
        description="A text that names nothing, such as 'a photo of a'. Where its own map exceeds "
        "prompts.neutral_threshold, the other maps are set to zero before they are normalised.",
    )
    neutral_threshold: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Threshold in [0, 1] above which the map of the neutral text sets the others to zero.",
    )
    marks: Line | tuple[MarkEntry, ...] | None = Field(
        None,
        description="Path or URL of a file of marks that a report saved (.csv or .json), or such a list "
        "itself: which prompts of which samples are explained. The others get no row and do not compete; "
        "null: all prompts are.",
    )
    keep_marked: Keep = Field(
        "not-bad",
        description="Which prompts prompts.marks keeps. good: those marked good. not-bad: all except those "
        "marked bad.",
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        return class_entries(value) if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _classes_have_names(self) -> PromptsConfig:
        if self.source == "classes" and self.classes is None:
            raise ValueError("prompts.source classes needs prompts.classes, the path of a classes file")
        for key in ("classes", "mentioned_in"):
            if self.source != "classes" and getattr(self, key) is not None:
                raise ValueError(f"prompts.{key} needs prompts.source classes, not {self.source}")
        return self


class OutputConfig(Section):
    """Where results are written, and what they hold."""

    dir: Line = Field(description="Output folder: local path, s3:// or gs://.")
    heatmap: bool = Field(
        True,
        description="Whether relevance grids are stored too, in 16 bits, with all that `legrad remask` needs "
        "to make masks again by other settings, without the model. Background texts then get a map in any "
        "case.",
    )
    rows: Literal["all", "accepted"] | None = Field(
        None,
        description="Which prompts get a row. all: rejected prompts too, without a mask. accepted: accepted "
        "prompts only. null: accepted if prompts.source is classes, else all.",
    )
    on_mismatch: Literal["refuse", "overwrite"] = Field(
        "refuse", description="What to do if the folder holds results of another configuration."
    )

    @field_validator("dir")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        if "@" in urlsplit(url).netloc:
            raise ValueError("credentials come from the environment, never from a URL")
        return url


class RunConfig(Section):
    """How the work is distributed; changes nothing in the results."""

    workers: Count | None = Field(
        None,
        description="Number of workers (Ray actors); null: as many as the cluster's devices allow. Machines "
        "that join during a run get workers, up to this number.",
    )
    gpus_per_worker: float = Field(
        1,
        ge=0,
        description="1: each worker has a GPU. A fraction, such as 0.5: workers share a GPU, each with a "
        "model of its own. 0: workers compute on CPUs. Without RAY_ADDRESS, a machine that has no GPU "
        "computes on its CPU in any case.",
    )
    cpus_per_worker: Count | None = Field(
        None,
        description="CPU cores of a worker; null: an equal share of its machine's cores for each worker that "
        "the machine can hold (at most `run.workers`), at most 32.",
    )
    wait_for_devices_s: float = Field(
        600.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds for which a run on a cluster waits for a first machine that can hold a worker; "
        "the run then ends with an error. A cluster with Ray's autoscaler may add machines meanwhile.",
    )
    batch_size: Count | Literal["auto"] = Field(
        "auto",
        description="Images in a forward pass. auto: on a GPU a size that keeps it busy, found by trial when "
        "a worker starts; on a CPU 8. A batch that does not fit the device's memory is halved in any case.",
    )
    lookahead_bytes: PositiveInt = Field(
        512 * MEBIBYTE,
        description="Largest amount of memory in bytes that a worker's samples in flight take: as read, as "
        "the model takes them, and as maps until they are masks. A larger sample is alone.",
    )
    shards_in_flight: Count = Field(
        7,
        description="Largest number of shards that a worker has begun and not published. If the worker is "
        "lost, these are annotated again. With too few, small shards leave the device without samples while "
        "others are opened and published.",
    )
    decode_threads: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None,
        description="Processes of a worker that decode images and make masks; null: one for each of its CPU "
        "cores; 0: none, the worker's own process does it in threads.",
    )
    decode_bytes: PositiveInt = Field(
        1024 * MEBIBYTE,
        description="Largest amount of memory in bytes that large images take at a time while they are "
        "decoded and masked, over all sample processes of a worker; a larger image is alone.",
    )
    sample_timeout_s: float | None = Field(
        300.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds after which a sample process that has not finished up to 32 samples is killed; "
        "they are then tried one by one, and a sample that takes as long twice becomes an error of kind "
        "timed_out. null: never. With run.decode_threads 0 there are no processes, and there is no limit.",
    )
    max_attempts: Count = Field(
        3, description="Number of attempts at a shard before it is recorded as failed."
    )
    retry_failed: bool = Field(True, description="Whether a rerun tries failed shards again.")
    retry_damaged: bool = Field(
        False,
        description="Whether a rerun reads damaged shards again although they have not changed; those that "
        "have changed are always read again.",
    )
    accept_damaged: bool = Field(
        False,
        description="Whether a job is complete although some of its shards are damaged (cut, corrupt, or "
        "not an archive). Their intact samples are annotated in any case.",
    )
    check_inputs: bool = Field(
        True,
        description="Whether web servers are asked for the size, ETag and date of each shard when a job "
        "starts, so that a shard that was replaced is annotated again.",
    )
    error_budget: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2,
        description="Largest share of failed samples in a complete job. A job above it is not complete, and "
        "stops early once 1000 samples are done and three shards are above it too.",
    )
    max_failed_shards: int | None = Field(
        None, ge=0, description="Largest number of failed shards; more of them stop the job; null: no limit."
    )
    stall_timeout_s: float | None = Field(
        1800.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds after which a shard of which no further sample was finished is tried on another "
        "worker; null: never. It counts as a failed attempt. A worker may take as long to load its model.",
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        le=LONGEST_WAIT_S,
        description="Seconds in which shards that are nearly done are finished when a run ends early: after "
        "SIGTERM, when the error budget is used up, or on a machine that Ray drains. `ray job stop` leaves a "
        "submitted job 3, unless the cluster was started with more in RAY_JOB_STOP_WAIT_TIME_S.",
    )
    min_read_bytes_per_s: float | None = Field(
        MIN_READ_BYTES_PER_S,
        ge=0,
        le=10**9,
        description="Smallest rate in bytes per second at which a shard must arrive while a worker waits for "
        "it, measured over 60 s of waiting. Below it the attempt at the shard fails. 0 or null: no limit.",
    )
    progress_interval_s: float = Field(
        10.0, gt=0, le=LONGEST_WAIT_S, description="Seconds between two progress lines in a log."
    )

    @field_validator("gpus_per_worker")
    @classmethod
    def _at_most_one_gpu(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("a worker computes on one GPU: expected 1, a fraction to share a GPU, or 0")
        if 0 < gpus < SMALLEST_GPU_SHARE:
            raise ValueError(f"the smallest share of a GPU is {SMALLEST_GPU_SHARE:g}")
        return gpus


class JobConfig(Section):
    """The configuration of a job."""

    input: InputConfig
    model: ModelConfig
    views: ViewsConfig = ViewsConfig()
    prompts: PromptsConfig = PromptsConfig()
    masks: MasksConfig = MasksConfig()
    output: OutputConfig
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _captions_need_json(self) -> JobConfig:
        if self.prompts.source == "captions" and ":" not in self.input.caption:
            raise ValueError(
                f"prompts.source captions reads a list from a JSON field: input.caption must be json:NAME, "
                f"got {self.input.caption!r}"
            )
        return self

    @property
    def contrast_share(self) -> float:
        """Share of `masks.contrast`, with null resolved."""
        if self.masks.contrast is not None:
            return self.masks.contrast
        shows_all_prompts = self.prompts.source != "classes" or self.prompts.mentioned_in is not None
        has_background = self.prompts.background not in ("none", ())
        return DEFAULT_CONTRAST if shows_all_prompts and has_background else 0.0

    @property
    def rows_written(self) -> Literal["all", "accepted"]:
        """Which rows are written: `output.rows`, with null resolved."""
        return self.output.rows or ("accepted" if self.prompts.source == "classes" else "all")

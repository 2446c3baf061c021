"""The section `masks` of a job's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from pipeline.config.section import Count, Section, Text

# Which keys each rule reads. The section stays flat instead of being a union of sections, one for each
# rule: job.json records all keys, those of other rules included, and must still be read.
RULE_KEYS: Mapping[str, tuple[str, ...]] = {
    "fixed": ("value",),
    "otsu": (),
    "quantile": ("quantile",),
    "band": ("low", "high", "band_center"),
}


class MasksConfig(Section):
    """How a heat map becomes a mask."""

    rule: Literal["fixed", "otsu", "quantile", "band"] = Field(
        "fixed",
        description="How the threshold of a heat map, whose values are in [0, 1], is chosen. fixed: "
        "masks.value. otsu: by Otsu's method, for each map. quantile: so that the share masks.quantile of "
        "the pixels is outside. band: foreground above masks.high, background up to masks.low, the ignore "
        "mask between them.",
    )
    value: float = Field(0.5, ge=0, le=1, description="Threshold of rule fixed.")
    quantile: float = Field(
        0.8, ge=0, le=1, description="Share of the pixels that are outside the mask under rule quantile."
    )
    low: float = Field(0.25, ge=0, le=1, description="Lower threshold of rule band.")
    high: float = Field(
        0.75, ge=0, le=1, validate_default=True, description="Upper threshold of rule band; above masks.low."
    )
    band_center: Literal["half", "otsu"] = Field(
        "half",
        description="Scale of masks.low and masks.high. half: values of the heat map. otsu: a scale on which "
        "0.5 is each map's own Otsu threshold, linear below and above it.",
    )
    combine: Literal["independent", "argmax"] = Field(
        "independent",
        description="How the masks of an image relate. independent: each prompt by itself, so masks may "
        "overlap. argmax: the prompts compete for each pixel, and so do the background texts where "
        "masks.contrast is 0; a pixel that no map raises above the threshold is background.",
    )
    smooth: float = Field(
        0.6,
        ge=0,
        le=100,
        description="Standard deviation of the Gaussian that smooths relevance grids, in patches, before "
        "masks.contrast and masks.refine; 0: none.",
    )
    contrast: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Contrast between the texts of an image: share of the strongest other text's grid that "
        "is subtracted from each prompt's grid, less where two texts are alike; 0: none; null: 0.6 if "
        "there are background texts and the prompts are captions or classes that a sample mentions, else 0, "
        "because classes that an image does not show would take from those that it shows. A prompt without "
        "any other text is not changed, and neither are the columns peak and heatmap.",
    )
    contrast_with: Literal["all", "background"] = Field(
        "all",
        description="Which other texts masks.contrast means. all: the background texts, and the prompts that "
        "neither masks.min_similarity, min_peak, min_foreground_contrast nor min_lead rejects. background: "
        "the background texts alone.",
    )
    refine: Literal["none", "pamr", "par"] = Field(
        "par",
        description="Whether heat maps are made to follow the edges of the image, at the model's input size: "
        "par as in Ru et al. (2022), pamr as in Araslanov and Roth (2020), or none.",
    )
    refine_iterations: Count = Field(
        8,
        description="Number of times that each pixel is replaced by the weighted mean of its neighbours.",
    )
    refine_dilations: list[Count] | None = Field(
        None,
        min_length=1,
        max_length=12,
        description="Distances of the neighbours, eight at each, in pixels of the model's input; null: a "
        "quarter of a patch, half a patch, one and two patches.",
    )
    refine_sharpness: float | None = Field(
        None,
        gt=0,
        description="Share of the neighbours' standard deviation that is one unit of colour distance; "
        "smaller values give sharper edges; null: the published value, 0.3 for par and 0.1 for pamr.",
    )
    max_side: Count | None = Field(
        None, description="Longest side of masks in pixels; null: the image's original size."
    )
    min_similarity: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Smallest cosine of image and prompt; below it a prompt gets the status "
        "rejected_similarity. A value that misses this or another limit by a rounding error (1e-5) is "
        "accepted.",
    )
    min_peak: float | None = Field(
        None,
        ge=0,
        description="Smallest maximum of a raw map; below it a prompt gets the status rejected_peak.",
    )
    min_foreground_contrast: float | None = Field(
        None,
        ge=0,
        description="Smallest contrast within a raw map, in the unit of the peak: the mean above the map's "
        "own Otsu threshold minus the mean below it. Below it a prompt gets the status rejected_contrast.",
    )
    min_lead: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Smallest lead of a prompt: its similarity to the image less that of the image's most "
        "similar other text, among the background texts and the prompts that the limits above do not reject. "
        "Below it a prompt gets the status rejected_lead; one without any other text is accepted.",
    )
    min_area: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Smallest share of the image that a mask covers; below it a prompt gets the status "
        "rejected_area.",
    )
    min_component: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Smallest connected part of a mask, as a share of the image; smaller parts are removed.",
    )
    max_hole: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Largest hole in a mask that is filled, as a share of the image.",
    )

    instances: Literal["none", "watershed"] = Field(
        "none",
        description="Whether the mask of a prompt is split into instances, which makes the column instances. "
        "watershed: one for each peak of the heat map, divided along the valleys between them; needs the "
        "extra instances.",
    )
    min_peak_drop: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Depth of the valley between two peaks that makes them two instances, as a share of the "
        "highest peak, after the map was smoothed by half a patch.",
    )
    segmenter: Text | None = Field(
        None,
        description="Model of the SAM family that sharpens masks: a folder, or a repository on the Hugging "
        "Face hub such as facebook/sam-vit-base; null: none. It gets the peaks of a heat map and the box of "
        "its mask: one prompt for each instance under masks.instances watershed, otherwise one for each "
        "mask. Needs the extra sam, and encodes every image a second time, by a far larger model.",
    )
    segmenter_revision: Text | None = Field(
        None, description="Commit, tag or branch of the segmenter's repository; null: its main branch."
    )
    segmenter_min_iou: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Smallest IoU of the map's own mask and the best of the segmenter's candidates; below it "
        "the own mask stays.",
    )

    @property
    def has_instances(self) -> bool:
        """Whether masks are split into instances."""
        return self.instances != "none"

    @field_validator("segmenter")
    @classmethod
    def _rule_has_fixed_threshold(cls, segmenter: str | None, info: ValidationInfo) -> str | None:
        rule = info.data.get("rule")
        centre = info.data.get("band_center")
        if segmenter is not None and (rule not in ("fixed", "band") or (rule, centre) == ("band", "otsu")):
            raise ValueError("needs masks.rule fixed, or band with masks.band_center half")
        return segmenter

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("low")
        if low is not None and not low < high:
            raise ValueError(f"must be above masks.low, which is {low}")
        return high

    @field_validator("refine_dilations")
    @classmethod
    def _different_distances(cls, distances: list[int] | None) -> list[int] | None:
        if distances is not None and len(set(distances)) < len(distances):
            raise ValueError("the distances must differ")
        return distances

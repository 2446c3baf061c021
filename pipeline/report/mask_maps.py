"""Heat maps from which a job cut its masks, made again from stored maps for the slider of the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from legrad.canvases import Views
from legrad.errors import LeGradError
from legrad.heatmaps import Normalisation
from legrad.masks.competition import Contestants, winners_of
from legrad.masks.grids import HeatmapStack
from legrad.masks.thresholds import cuts_of
from pipeline.annotate.cutting import mask_rule
from pipeline.annotate.maps import refined_maps, refinement_of
from pipeline.annotate.model import transform_of_facts
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import SampleMaps
from pipeline.annotate.sample_work import WorkSettings
from pipeline.annotate.stored_maps import StoredMaps
from pipeline.annotate.stored_samples import ROW_COLUMNS, StoredItem, StoredSample, StoredWork
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, PipelineError
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.label_map import mask_frame
from pipeline.output.records import ModelFacts
from pipeline.output.schema import ACCEPTED, TEXT_DISTANCES
from pipeline.shards.samples import RawSample

# longest side of a map in pixels; the page's pictures have no more
MAP_SIDE = 240
# maps times pixels of the model's input, for one page; a core refines about a million in a second
MAX_REFINED_VALUES = 100_000_000
# preparing an image for refinement takes as long as refining some maps
MAPS_PER_IMAGE = 4

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MaskMap:
    """What the mask of a row was cut from.

    Attributes:
        heatmap: from 0 to 1; zero where another text has won the pixel.
        cut: threshold by the job's rule; the mask is what lies above it.
    """

    heatmap: Float32[np.ndarray, "height width"]
    cut: float


class MaskMaps:
    """Makes the maps of samples again, by the steps of `legrad remask`.

    Args:
        config: configuration of the job.
        facts: of the model whose maps the job stored.
    """

    def __init__(self, config: JobConfig, facts: ModelFacts) -> None:
        self._masks = config.masks
        self._normalisation = facts.normalisation
        self._refinement = refinement_of(config.masks, facts.patch_size)
        self._input_pixels = facts.input_height * facts.input_width
        self._refinable_values = MAX_REFINED_VALUES
        views = Views(tile=config.model.fit == "tile", **config.views.model_dump())
        # the rows are those that marks have kept
        unmarked = config.model_copy(update={"prompts": config.prompts.model_copy(update={"marks": None})})
        self._work = StoredWork(WorkSettings(unmarked, transform_of_facts(facts), views, None))
        # refined afterwards, because the page shows few of a sample's prompts
        unrefined = config.model_copy(update={"masks": config.masks.model_copy(update={"refine": "none"})})
        self._steps = StoredMaps(unrefined, facts, torch.device("cpu"))

    def of_sample(
        self, rows: Sequence[Row], sample: RawSample, wanted: Collection[int]
    ) -> dict[int, MaskMap]:
        """Return the maps of some rows of a sample by prompt index; those that cannot be made are omitted.

        Args:
            rows: all rows of the sample, in their order.
            sample: as its shard holds it.
            wanted: prompt indices of rows.
        """
        rivals = {row["prompt_index"] for row in rows if self._competes and row["status"] in ACCEPTED}
        if not wanted or not self._has_time_for(len({*rivals, *wanted})):
            return {}
        image = None if self._refinement is None else sample
        try:
            (prepared,) = self._work.prepare([StoredItem(sample.key, sample.index, tuple(rows), image=image)])
            return {} if isinstance(prepared, SampleRows) else self._maps(prepared, rivals, wanted)
        # what an untrusted file holds may be anything
        except (PipelineError, LeGradError, ValueError, LookupError, RuntimeError):
            return {}

    @property
    def _competes(self) -> bool:
        return self._masks.combine == "argmax"

    def _has_time_for(self, maps: int) -> bool:
        """Return whether the page may take the time to refine the maps of one more sample."""
        if self._refinement is None:
            return True
        self._refinable_values -= (maps + MAPS_PER_IMAGE) * self._input_pixels
        return self._refinable_values >= 0

    def _maps(
        self, sample: StoredSample, rivals: Collection[int], wanted: Collection[int]
    ) -> dict[int, MaskMap]:
        maps = self._steps.explain([sample])[0].maps
        number_of = dict(
            zip((prompt.index for prompt in sample.prompts), maps.map_of_prompt.tolist(), strict=True)
        )
        needed = [index for index in number_of if index in rivals or index in wanted]
        backgrounds = range(maps.prompt_maps, len(maps.cut_maps)) if self._competes else range(0)
        side = min(MAP_SIDE, self._masks.max_side or MAP_SIDE)
        heatmaps = _SampleHeatmaps(
            self._arrays(sample, maps, sorted({number_of[index] for index in needed} | {*backgrounds})),
            maps.peaks,
            mask_frame(sample.image_height, sample.image_width, side),
            maps.normalisation if self._refinement is None else None,
            self._masks,
        )
        found: dict[int, MaskMap] = {}
        for index in set(wanted) & number_of.keys():
            against = [rival for rival in needed if rival == index or rival in rivals]
            numbers = [number_of[rival] for rival in against]
            found[index] = (
                heatmaps.competing(numbers, against.index(index), backgrounds)
                if self._competes
                else heatmaps.alone(number_of[index])
            )
        return found

    def _arrays(
        self, sample: StoredSample, maps: SampleMaps, numbers: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Return some of a sample's maps by number, refined if the job refines them."""
        grids = maps.cut_maps[list(numbers)]
        if self._refinement is None:
            return dict(zip(numbers, grids, strict=True))
        pixels = torch.from_numpy(sample.canvases[0])[None]
        owners = torch.zeros(len(numbers), dtype=torch.int64)
        refined = refined_maps(pixels, torch.from_numpy(grids), owners, self._refinement, self._normalisation)
        return dict(zip(numbers, refined.numpy(), strict=True))


@dataclass(frozen=True)
class _SampleHeatmaps:
    """The heat maps of a sample in a frame of limited size.

    Attributes:
        arrays: grids, or heat maps in the frame of the model's input, by the number of the map.
        peaks: of all maps of the sample.
        frame: height and width.
        normalisation: see `HeatmapStack`.
        masks: how masks are cut.
    """

    arrays: Mapping[int, np.ndarray]
    peaks: np.ndarray
    frame: tuple[int, int]
    normalisation: Normalisation | None
    masks: MasksConfig

    def alone(self, number: int) -> MaskMap:
        """Return a map that is thresholded by itself."""
        (heatmap,) = self._contestants([number]).heatmaps.columns()
        return MaskMap(heatmap.T, cuts_of(heatmap, mask_rule(self.masks))[1])

    def competing(self, rivals: Sequence[int], place: int, backgrounds: Sequence[int]) -> MaskMap:
        """Return the map of the rival at a place, zero where another rival or a background text wins."""
        won = winners_of(self._contestants(rivals), self._contestants(backgrounds))
        heatmap = np.where(won.winner == place, won.heat, np.float32(0))
        return MaskMap(heatmap.T, cuts_of(won.heat, mask_rule(self.masks))[1])

    def _contestants(self, numbers: Sequence[int]) -> Contestants:
        shape = next(iter(self.arrays.values())).shape
        maps = np.array([self.arrays[number] for number in numbers], np.float32).reshape(-1, *shape)
        stack = HeatmapStack(maps, *self.frame, normalisation=self.normalisation)
        return Contestants(stack, self.peaks[list(numbers)])


def rows_of_samples(folder: OutputFolder, shard_id: str, indices: Collection[int]) -> dict[int, list[Row]]:
    """Return all rows of some samples of a shard by their ordinals; none where the maps do not suffice."""
    found: dict[int, list[Row]] = defaultdict(list)
    try:
        with folder.open(ANNOTATIONS, shard_id) as table:
            if TEXT_DISTANCES not in table.column_names:
                return {}
            for number in range(len(table.group_row_counts)):
                ordinals = table.read_group(number, ["sample_index"])["sample_index"].to_numpy()
                offsets = np.flatnonzero(np.isin(ordinals, list(indices))).tolist()
                if offsets:
                    for row in table.read_group(number, (*ROW_COLUMNS, "status"), offsets).to_pylist():
                        found[row["sample_index"]].append(row)
    except DamagedFileError:
        return {}
    return found

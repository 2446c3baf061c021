"""Samples for a trial of the device step: of the kind that a job brings, with nothing to read or decode."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import count

from PIL import Image

from legrad.canvases import Views, canvas_pixels
from legrad.images import ImageTransform
from pipeline.annotate.sample_states import PreparedSample
from pipeline.prompts.sample_prompts import Prompt

# As many as captions of web pages have on average; rarely two trials draw the same.
WORDS_A_CAPTION = 13
WORDS = """
a the of in on with and two old small red green white black wooden dog cat horse bird boat car bus train
street river house tree field mountain sky cloud man woman child group table chair cup plate window door
walks stands sits near behind under above holding wearing looking during winter summer evening morning
"""


@dataclass(frozen=True)
class TrialSamples:
    """Makes samples for a trial.

    Attributes:
        transform: preprocessing of the model.
        views: views of each image.
        prompts_per_sample: prompts of each image, at least one.
        texts_recur: whether all samples of the job share their prompts, as with a list of classes; otherwise
            no two samples of any trial have a prompt in common.
    """

    transform: ImageTransform
    views: Views
    prompts_per_sample: int
    texts_recur: bool = False
    _numbers: count[int] = field(default_factory=count, repr=False)

    def batch(self, images: int) -> list[PreparedSample]:
        """Return samples whose image has the input's aspect ratio, and as many pixels as views can use."""
        factor = math.ceil(max(self.views.tile_zoom, *self.views.scales))
        width, height = self.transform.width * factor, self.transform.height * factor
        canvases = canvas_pixels(self.views, self.transform, Image.new("RGB", (width, height)))
        shared = self._prompts(0) if self.texts_recur else None
        return [
            PreparedSample(
                index, "trial", height, width, canvases, shared or self._prompts(next(self._numbers))
            )
            for index in range(images)
        ]

    def _prompts(self, sample: int) -> tuple[Prompt, ...]:
        words, choices = WORDS.split(), random.Random(sample)  # noqa: S311
        return tuple(
            Prompt(index, " ".join(choices.choices(words, k=WORDS_A_CAPTION)))
            for index in range(self.prompts_per_sample)
        )

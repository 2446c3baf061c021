"""A preprocessing that fails on images of certain colours, as a broken decoder does on certain files."""

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from legrad.images import ImageTransform
from pipeline.annotate.sample_work import WorkSettings
from pipeline.shards.images import WHOLE_IMAGE
from tests.helpers.corpus import demo_job

SEGFAULT, KILL, EXIT, MEMORY, BUG = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)
HANG, STOP = (250, 0, 250), (250, 250, 250)


def act(colour: tuple[int, int, int]) -> None:
    """Do what a colour means; nothing for other colours."""
    if colour == SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    if colour == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if colour == EXIT:
        os._exit(7)
    if colour == MEMORY:
        raise MemoryError
    if colour == HANG:
        threading.Event().wait()
    if colour == STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
    if colour == BUG:
        raise ZeroDivisionError("a bug")


@dataclass(frozen=True)
class DeadlyTransform(ImageTransform):
    """Resizes as ever, unless an image has one of the colours above in its corner; for PNGs."""

    def resize_to(self, image: Image.Image, *arguments: Any, **options: Any) -> np.ndarray:
        act(image.convert("RGB").getpixel((0, 0)))
        return super().resize_to(image, *arguments, **options)


class DiesWhenItArrives:
    """Kills the process in which it is unpickled, or does there what another colour means."""

    def __init__(self, colour=SEGFAULT):
        self.colour = colour

    def __reduce__(self):
        return act, (self.colour,)


def settings_of(out="out", **sections):
    """Settings of the work on samples, for a job on the demo model."""
    transform = DeadlyTransform(96, 96, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), patch_size=8)
    return WorkSettings(demo_job([], out, **sections), transform, WHOLE_IMAGE, None)

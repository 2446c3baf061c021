"""A model of ViT-B/16's shape with seeded weights, and batches of samples for it."""

import numpy as np
import open_clip
import torch

import legrad
from pipeline.annotate.engine import Engine
from pipeline.annotate.maps import refinement_of
from pipeline.annotate.sample_states import PreparedSample
from pipeline.config.schema import MasksConfig
from pipeline.prompts.sample_prompts import Prompt
from tests.helpers.device_work import DeviceWork
from tests.helpers.tiny_models import fill

SIDE, PATCH, HEAD_WIDTH = 224, 16, 64
WORDS = "a red dog cat house tree river boy girl under green sky wide old stone near two small"


def clip_of_width(width=64, precision="bf16"):
    """A CLIP of ViT-B/16's blocks, patches and context, of any width."""
    cast_dtype = torch.bfloat16 if precision == "bf16" else None
    vision = {"layers": 12, "width": width, "head_width": HEAD_WIDTH, "patch_size": PATCH, "image_size": SIDE}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 12}
    model = fill(open_clip.CLIP(512 if width >= 512 else 64, vision, text, cast_dtype=cast_dtype)).eval()
    if cast_dtype is not None:
        open_clip.convert_weights_to_lp(model, dtype=cast_dtype)
    return model


def samples(images, prompts, seed=0):
    """Prepared samples of noise, each with captions of 13 words that no other has."""
    generator = np.random.default_rng(seed)
    return [
        PreparedSample(
            index,
            f"k{index}",
            375,
            500,
            (generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),),
            tuple(Prompt(each, " ".join(generator.choice(WORDS.split(), 13))) for each in range(prompts)),
        )
        for index in range(images)
    ]


def counted_step(images=64, prompts=1, refine="par", width=64, precision="bf16"):
    """Count what the second step of an engine gives to a device."""
    explainer = legrad.LeGrad(
        clip_of_width(width, precision), tokenizer=open_clip.get_tokenizer("ViT-B-16"), layers=2
    )
    work = DeviceWork(explainer.model)
    with work.counted():
        refinement = refinement_of(MasksConfig(refine=refine), PATCH)
        engine = Engine(explainer, 32, images, refinement=refinement)
        engine.explain(samples(2, prompts, seed=1))
        work.by_part.clear()
        work.operations.clear()
        engine.explain(samples(images, prompts))
    return work

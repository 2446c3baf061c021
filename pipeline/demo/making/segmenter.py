"""A small segmenter: a decoder on the demo CLIP's frozen vision tower, with texts as classifier."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.demo import assets
from pipeline.demo.making.captions import canonical_caption

INPUT_SIDE, PATCH_SIDE = 96, 8
BLOCKS = (1, 3, 5)
TOWER_WIDTH = 192
DECODER_WIDTH = 64
IMAGE_GAIN = 10.0
# class scores are logits of about 10; convolutions want inputs of about 1
EVIDENCE_SCALE = 0.1


class TowerFeatures(NamedTuple):
    """What the tower sees in images; it is frozen, so this is the same for every decoder.

    Attributes:
        grids: patch features of some blocks, side by side, in half the precision to take half the memory.
        similarities: cosine of each image and each class's text.
    """

    grids: Float[Tensor, "batch channels grid_rows grid_columns"]
    similarities: Float[Tensor, "batch classes"]


class PixelScores(NamedTuple):
    """Logits of the pixels: outlines are fine, classes coarse, since no outline depends on the class.

    Attributes:
        foreground: whether a pixel shows any of the classes, at half the input's resolution.
        classes: which one, if so, for each patch.
    """

    foreground: Float[Tensor, "batch 1 rows columns"]
    classes: Float[Tensor, "batch classes grid_rows grid_columns"]


class Decoder(nn.Module):
    """Foreground from the tower's features and edges of a small stem; classes from features and texts.

    Args:
        texts: unit embedding of each class.
    """

    def __init__(self, texts: Float[Tensor, "classes dim"]) -> None:
        super().__init__()
        channels, width = len(BLOCKS) * TOWER_WIDTH, DECODER_WIDTH
        self.stem = nn.Sequential(Conv2dNormActivation(3, 16, stride=2), Conv2dNormActivation(16, 16))
        self.stem_deeper = Conv2dNormActivation(16, 32, stride=2)
        self.embed = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, TOWER_WIDTH, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(TOWER_WIDTH, texts.shape[1], kernel_size=1),
        )
        self.narrow = nn.Sequential(
            nn.GroupNorm(1, channels), Conv2dNormActivation(channels, width, kernel_size=1)
        )
        self.with_evidence = Conv2dNormActivation(width + 2, width)
        self.at_quarter = nn.Sequential(
            Conv2dNormActivation(width + 32, width), nn.Conv2d(width, 24, kernel_size=1)
        )
        self.at_half = nn.Sequential(
            Conv2dNormActivation(24 + 16, 24), Conv2dNormActivation(24, 24), nn.Conv2d(24, 1, kernel_size=1)
        )
        self.texts = nn.Parameter(texts.clone())
        self.image_gain = nn.Parameter(torch.tensor(IMAGE_GAIN))
        self.class_bias = nn.Parameter(torch.zeros(len(texts)))

    def forward(self, images: Float[Tensor, "batch 3 side side"], features: TowerFeatures) -> PixelScores:
        """Score images, normalised as the tower expects."""
        grids = features.grids.float()
        in_image = self.image_gain * features.similarities + self.class_bias
        classes = torch.einsum("bdyx,cd->bcyx", self.embed(grids), self.texts) + in_image[..., None, None]
        half = self.stem(images)
        quarter = self.stem_deeper(half)
        known = self.with_evidence(torch.cat([self.narrow(grids), _evidence(classes)], dim=1))
        known = self.at_quarter(torch.cat([_as_large_as(quarter, known), quarter], dim=1))
        foreground = self.at_half(torch.cat([_as_large_as(half, known), half], dim=1))
        return PixelScores(foreground, classes)


def _evidence(classes: Float[Tensor, "batch classes _ _"]) -> Float[Tensor, "batch 2 _ _"]:
    """How much a patch looks like any class at all."""
    strongest = torch.stack([classes.amax(dim=1), classes.logsumexp(dim=1)], dim=1)
    return EVIDENCE_SCALE * strongest


def _as_large_as(
    frame: Float[Tensor, "batch _ rows columns"], maps: Float[Tensor, "batch channels _ _"]
) -> Tensor:
    return F.interpolate(maps, size=frame.shape[-2:], mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A decoder and the tower that it decodes, which stays frozen.

    Args:
        tower: open_clip's vision transformer, with a grid of 12 x 12 patches.
        texts: embedding of each class; the classifier of pixels and of whole images.
    """

    texts: Tensor

    def __init__(self, tower: nn.Module, texts: Float[Tensor, "classes dim"]) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        # what all texts have in common does not separate the classes
        self.register_buffer("texts", F.normalize(texts - texts.mean(dim=0), dim=1))
        self.decoder = Decoder(self.texts)

    @torch.no_grad()
    def features(self, images: Float[Tensor, "batch 3 side side"]) -> TowerFeatures:
        """Return what the tower sees in images, normalised as it expects."""
        seen = self.tower.forward_intermediates(  # type: ignore[operator]
            images, indices=list(BLOCKS), output_fmt="NCHW"
        )
        similarities = F.normalize(seen["image_features"], dim=1) @ self.texts.T
        return TowerFeatures(torch.cat(seen["image_intermediates"], dim=1).half(), similarities)

    def forward(self, images: Float[Tensor, "batch 3 side side"]) -> PixelScores:
        """Score images, normalised as the tower expects."""
        scores: PixelScores = self.decoder(images, self.features(images))
        return scores


def make_segmenter(seed: int, clip_weights: Path | None = None) -> Segmenter:
    """Return an untrained segmenter; tower and texts are those of the demo CLIP, the rest is random.

    Args:
        seed: of the decoder.
        clip_weights: of the demo CLIP; None: those that are shipped.
    """
    name = assets.register_demo_model()
    weights = clip_weights or assets.demo_weights_path()
    clip = open_clip.create_model(name, pretrained=str(weights), precision="fp32")
    names = [canonical_caption(class_id) for class_id in range(1, 1 + len(assets.demo_classes()))]
    with torch.no_grad():
        texts = clip.encode_text(open_clip.get_tokenizer(name)(names), normalize=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Segmenter(clip.visual, texts)

"""A small segmenter: the demo CLIP's vision tower, a light decoder, and the classes' texts as classifier."""

from __future__ import annotations

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.demo import assets
from pipeline.demo.making.captions import canonical_caption

INPUT_SIDE = 96
BLOCKS = (1, 3, 5)
IMAGE_GAIN = 10.0
TOWER_WIDTH = 192


class Segmenter(nn.Module):
    """Class scores for each pixel, from features of the tower and edges of a convolutional stem.

    Args:
        tower: open_clip's vision transformer, with a grid of 12 x 12 patches.
        texts: embedding of each class; the classifier of pixels, beside what the whole image shows.
        frozen_blocks: how many of the tower's first blocks stay as they are, which saves time.
    """

    def __init__(self, tower: nn.Module, texts: Float[Tensor, "classes dim"], frozen_blocks: int = 3) -> None:
        super().__init__()
        self.tower = tower
        tower.requires_grad_(False)
        for block in tower.transformer.resblocks[frozen_blocks:]:  # type: ignore[union-attr,index]
            block.requires_grad_(True)
        self.stem = nn.Sequential(
            Conv2dNormActivation(3, 16, stride=2), Conv2dNormActivation(16, 16), Conv2dNormActivation(16, 16)
        )
        self.stem_deeper = nn.Sequential(Conv2dNormActivation(16, 32, stride=2), Conv2dNormActivation(32, 32))
        self.narrow = Conv2dNormActivation(len(BLOCKS) * TOWER_WIDTH, 96, kernel_size=1)
        self.at_quarter = Conv2dNormActivation(96 + 32, 64)
        self.at_half = Conv2dNormActivation(64 + 16, 64)
        # one channel more than a text has: background
        self.embed = nn.Conv2d(64, 1 + texts.shape[1], kernel_size=1)
        # what all texts have in common does not separate the classes
        self.texts = nn.Parameter(F.normalize(texts - texts.mean(dim=0), dim=1))
        self.image_gain = nn.Parameter(torch.tensor(IMAGE_GAIN))

    def forward(
        self, images: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch labels rows columns"]:
        """Score images, normalised as the tower expects; rows and columns are half the side."""
        seen = self.tower.forward_intermediates(  # type: ignore[operator]
            images, indices=list(BLOCKS), output_fmt="NCHW"
        )
        features = seen["image_intermediates"]
        shown = F.normalize(seen["image_features"], dim=1) @ self.texts.T
        half = self.stem(images)
        quarter = self.stem_deeper(half)
        known = self.narrow(torch.cat(features, dim=1))
        known = self.at_quarter(torch.cat([_as_large_as(quarter, known), quarter], dim=1))
        pixels = self.embed(self.at_half(torch.cat([_as_large_as(half, known), half], dim=1)))
        classes = torch.einsum("bdyx,cd->bcyx", pixels[:, 1:], self.texts)
        return torch.cat([pixels[:, :1], classes + self.image_gain * shown[..., None, None]], dim=1)


def _as_large_as(
    frame: Float[Tensor, "batch _ rows columns"], maps: Float[Tensor, "batch channels _ _"]
) -> Tensor:
    return F.interpolate(maps, size=frame.shape[-2:], mode="bilinear", align_corners=False)


def make_segmenter(seed: int) -> Segmenter:
    """Return an untrained segmenter; tower and texts are those of the demo CLIP, the rest is random."""
    name = assets.register_demo_model()
    clip = open_clip.create_model(name, pretrained=str(assets.demo_weights_path()), precision="fp32")
    names = [canonical_caption(class_id) for class_id in range(1, 1 + len(assets.demo_classes()))]
    with torch.no_grad():
        texts = clip.encode_text(open_clip.get_tokenizer(name)(names), normalize=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Segmenter(clip.visual, texts)

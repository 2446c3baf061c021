"""Training on what the pipeline wrote: image shards and mask files, joined sample by sample.

dataset = MaskDataset("out/mine", "data/*.tar", transform=transform)
loader = DataLoader(dataset, batch_size=32, num_workers=4, collate_fn=collate)
"""

from pipeline.output.joining import JoinCounts, ShardPair, pair_shards
from pipeline.training.collate import collate
from pipeline.training.dataset import MaskDataset
from pipeline.training.targets import pixel_weights, similarity_weight

__all__ = [
    "JoinCounts",
    "MaskDataset",
    "ShardPair",
    "collate",
    "pair_shards",
    "pixel_weights",
    "similarity_weight",
]

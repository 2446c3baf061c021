"""Masks of a baseline in place of LeGrad, by the same steps: views, refinement, thresholds, rows.

They are no job: the folder has no job.json, so that no other command takes them for LeGrad's masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

import legrad
from legrad.classes import ClassIndex
from legrad.inputs import RaggedPrompts
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer, weights_digest
from pipeline.config.load import config_hash
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, UserError
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.prompts.sample_prompts import with_files_read
from pipeline.storage import ShardSource

LAYERS = 2  # blocks that a trace must hold for the dense baselines
DENSE_BASELINES = {legrad.BASELINES[name].title: name for name in ("maskclip", "sclip", "naclip")}


class BaselineExplainer(legrad.LeGrad):
    """Explain prompts by the cosines of dense features in place of LeGrad.

    Args:
        explainer: the model, with its size and fit of images.
        baseline: title of one of DENSE_BASELINES.

    Raises:
        UserError: there is no such baseline.
    """

    def __init__(self, explainer: legrad.LeGrad, baseline: str) -> None:
        if baseline not in DENSE_BASELINES:
            raise UserError(f"baseline {baseline!r}: expected one of {', '.join(DENSE_BASELINES)}")
        transform = explainer.transform
        super().__init__(
            explainer.model,
            tokenizer=explainer.tokenizer,
            processor=explainer.processor,
            layers=LAYERS,
            image_size=(transform.height, transform.width),
            fit=transform.fit,
        )
        self._baseline = DENSE_BASELINES[baseline]

    def relevance(
        self,
        images: Float[Tensor, "batch 3 height width"] | legrad.Trace,
        text_embeddings: Float[Tensor, "*leading embed_dim"] | RaggedPrompts | None = None,
        image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
        *,
        class_index: ClassIndex | None = None,
        per_layer: bool = False,
        memory_budget_bytes: int | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "*maps grid_height grid_width"]:
        """Return cosines on the patch grid, from -1 to 1; the arguments are those of `LeGrad.relevance`."""
        if per_layer:
            raise UserError("a baseline of dense features has no layers")
        if text_embeddings is None or class_index is not None:
            raise UserError("a baseline of dense features explains texts, not classes by their number")
        return legrad.baseline(self, self._baseline, images, text_embeddings, image_index)


def write_baseline_masks(
    config: JobConfig,
    shards: Sequence[ShardSource],
    baseline: str,
    *,
    on_shard: Callable[[ShardSource], None] = lambda _: None,
) -> str:
    """Annotate shards with a baseline into `output.dir`, in this process; shards that are done are skipped.

    Args:
        config: configuration of a job; what it says of layers and affinity does nothing.
        shards: the tars.
        baseline: name of the baseline.
        on_shard: called when a shard is done.

    Returns:
        The hash that stands in the files of these masks in place of a job's.

    Raises:
        UserError: the configuration does not fit the model, or there is no such baseline.
        ShardError: a shard cannot be read.
        OutputError: a result cannot be written.
    """
    # cosines may be negative, and are no share of a peak
    output = config.output.model_copy(update={"heatmap": False})
    config = config.model_copy(update={"prompts": with_files_read(config.prompts), "output": output})
    digest = weights_digest(config.model)
    own_hash = hashlib.sha256(f"{config_hash(config, digest)} {baseline}".encode()).hexdigest()[:16]
    folder = OutputFolder(config.output.dir)
    left = [shard for shard in shards if not _is_done(folder, shard, own_hash)]
    if left:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = load_explainer(config.model, device, expected_digest=digest)
        annotator = ShardAnnotator(
            config,
            BaselineExplainer(loaded, baseline),
            decode_threads=max(1, config.run.decode_threads or 1),
            metadata={"config_hash": own_hash},
        )
        try:
            for shard in left:
                annotator.annotate(shard)
                on_shard(shard)
        finally:
            annotator.close()
    return own_hash


def _is_done(folder: OutputFolder, shard: ShardSource, own_hash: str) -> bool:
    if shard.shard_id not in folder.ids(ANNOTATIONS):
        return False
    try:
        return folder.own_footer(shard.shard_id, own_hash).state == "done"
    except DamagedFileError:
        return False

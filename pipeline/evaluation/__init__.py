"""Masks and heat maps against ground truth.

evaluate: mask_scores (the masks that a job wrote; scene by scene in scene_masks) and map_methods (LeGrad and
baselines on the job's model; scored by map_scores and perturbation) -> result -> rendering
tune: tuning (settings tried on stored maps), tuning_text
python -m pipeline.cli.sweep: sweep (variants, and their table), baseline_masks (a baseline replaces LeGrad)
"""

"""Masks and maps against ground truth.

written_masks (rows of a job), map_figures (maps of its model) -> scene_scores, map_scores -> result
-> table, plot
"""

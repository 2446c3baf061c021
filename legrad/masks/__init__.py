"""Convert relevance grids to masks: refinement, thresholds, cleaning, competition, run-length encoding."""

"""The demo: a small CLIP, captioned scenes with ground truth, and the programs that made both."""

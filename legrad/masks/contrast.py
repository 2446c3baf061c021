"""The published contrasts of the refinement kernels; kept apart from `refine`, which needs torch."""

PUBLISHED_CONTRAST = {"pamr": 0.1, "par": 0.3}

"""The published sharpness of the refinement kernels; kept apart from `refine`, which needs torch."""

PUBLISHED_SHARPNESS = {"pamr": 0.1, "par": 0.3}

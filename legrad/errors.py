"""Exceptions of this package.

LeGradError
 ├── UnsupportedModelError   the structure of the vision tower is not covered
 ├── ModelLoadError          no model could be made from a name, tag or checkpoint
 ├── InputError              a tensor, index or option does not fit the model or the other inputs
 ├── TokenizerError          texts were passed to an explainer that has no tokenizer
 └── MaskError               no masks can be made from the grids, masks or rule
      └── RleError           a run-length encoding is invalid
"""


class LeGradError(Exception):
    """Base class of all errors that `legrad` raises."""


class UnsupportedModelError(LeGradError):
    """The structure of the vision tower is not covered."""


class ModelLoadError(LeGradError):
    """No model could be made from a name, tag or checkpoint."""


class InputError(LeGradError):
    """A tensor, an index or an option does not fit the model or the other inputs."""


class TokenizerError(LeGradError):
    """Texts were passed to an explainer that has no tokenizer."""


class MaskError(LeGradError):
    """No masks can be made from the grids, masks or rule."""


class RleError(MaskError):
    """A run-length encoding does not encode a mask of its size, or the mask is too large.

    Attributes:
        fault: kind of the error: size, frame, counts, not_ascii, alphabet, truncated, overflow,
            many_runs, negative_run, long_run or sum.
    """

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(fault, message)
        self.fault = fault

    def __str__(self) -> str:
        return f"mask: {self.args[1]}"

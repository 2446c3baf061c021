"""The exceptions of the method.

LeGradError
 ├── UnsupportedModelError   a vision tower whose structure this method does not cover
 ├── ModelLoadError          a name, tag or checkpoint from which no model could be made
 ├── InputError              a tensor, index or option that does not fit the model or the other inputs
 ├── TokenizerError          texts given to an explainer that has no tokenizer
 └── MaskError               grids, masks or a rule from which no masks can be made
      └── RleError           a run-length encoding that is not one of a mask of its size
"""


class LeGradError(Exception):
    """Anything that `legrad` refuses to do."""


class UnsupportedModelError(LeGradError):
    """A vision tower whose structure this method does not cover."""


class ModelLoadError(LeGradError):
    """A model name, tag or checkpoint from which no model could be made."""


class InputError(LeGradError):
    """A tensor, an index or an option that does not fit the model or the other inputs."""


class TokenizerError(LeGradError):
    """Texts given to an explainer that has no tokenizer."""


class MaskError(LeGradError):
    """Grids, masks or a rule from which no masks can be made."""


class RleError(MaskError):
    """A run-length encoding that is not one of a mask of its size.

    Attributes:
        fault: what is wrong, in a word: size, frame, counts, not_ascii, alphabet, truncated, overflow,
            many_runs, negative_run, long_run or sum.
    """

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(fault, message)
        self.fault = fault

    def __str__(self) -> str:
        return f"mask: {self.args[1]}"

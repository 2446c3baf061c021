"""Exceptions of this package.

LeGradError
 ├── UnsupportedModelError   the structure of the vision tower is not covered
 ├── ModelLoadError          no model could be made from a name, tag or checkpoint
 ├── InputError              an argument is of another kind, or does not fit the model or other arguments
 │    └── ImageFileError     a file holds no image that is read
 ├── TokenizerError          texts were passed to an explainer that has no tokenizer
 └── MaskError               no masks can be made from the grids, masks or rule
      └── RleError           a run-length encoding is invalid
"""


class LeGradError(Exception):
    """Base class of all errors that `legrad` raises.

    Example:
        >>> try:
        ...     legrad.MaskRule("brightest")
        ... except legrad.LeGradError as error:
        ...     print(error)
        mask rule: expected one of fixed, otsu, quantile, band, received 'brightest'
    """


class UnsupportedModelError(LeGradError):
    """The structure of the vision tower is not covered.

    Example:
        >>> hook = explainer.model.visual.ln_post.register_forward_hook(lambda *_: None)
        >>> try:
        ...     explainer.preprocess([image])
        ... except legrad.UnsupportedModelError as error:
        ...     print("the hook is named:", "ln_post" in str(error))
        the hook is named: True
        >>> hook.remove()
    """


class ModelLoadError(LeGradError):
    """No model could be made from a name, tag or checkpoint.

    Example:
        >>> try:
        ...     legrad.LeGrad.from_open_clip("ViT-B-61", "openai")
        ... except legrad.ModelLoadError as error:
        ...     print(error)
        open_clip has no model named 'ViT-B-61'...
    """


class InputError(LeGradError):
    """An argument is of another kind than expected, or does not fit the model or the other arguments.

    Example:
        >>> try:
        ...     legrad.Views(scales=())
        ... except legrad.InputError as error:
        ...     print(error)
        scales: expected 1 to 8 different factors, received ()
    """


class ImageFileError(InputError):
    """A file holds no image that is read.

    Attributes:
        kind: empty, format_not_allowed, too_many_pixels, side_too_long, too_many_parts, animated,
            unsupported_mode, truncated, corrupt (checks find the file damaged) or unreadable (its decoder
            fails).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


class TokenizerError(LeGradError):
    """Texts were passed to an explainer that has no tokenizer.

    Example:
        >>> try:
        ...     legrad.LeGrad(explainer.model).embed_text(["a panda"])
        ... except legrad.TokenizerError as error:
        ...     print(error)
        embed_text: this LeGrad has no tokenizer...
    """


class MaskError(LeGradError):
    """No masks can be made from the grids, masks or rule.

    Example:
        >>> try:
        ...     legrad.MaskRule("fixed", value=2.0)
        ... except legrad.MaskError as error:
        ...     print(error)
        mask rule: expected value from 0 to 1, received 2.0
    """


class RleError(MaskError):
    """A run-length encoding does not encode a mask of its size, or the mask is too large.

    Attributes:
        fault: kind of the error: size, frame, counts, not_ascii, alphabet, truncated, overflow,
            many_runs, negative_run, long_run or sum.

    Example:
        >>> try:
        ...     legrad.decode_rle({"size": [2, 2], "counts": "12"})
        ... except legrad.RleError as error:
        ...     print(error.fault)
        sum
    """

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(fault, message)
        self.fault = fault

    def __str__(self) -> str:
        return f"mask: {self.args[1]}"

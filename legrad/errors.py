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
    """A tensor, an index or an option does not fit the model or the other inputs.

    Example:
        >>> try:
        ...     legrad.Views(scales=())
        ... except legrad.InputError as error:
        ...     print(error)
        scales: expected 1 to 8 different factors, received ()
    """


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

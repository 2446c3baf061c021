"""Why a model could not be made, in one line that says what to do."""

from collections.abc import Iterator
from importlib.util import find_spec
from pickle import UnpicklingError
from urllib.error import URLError

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from legrad.errors import ModelLoadError

MAX_CAUSE_LENGTH = 300


def load_failure(name: str, pretrained: str | None, error: Exception) -> str:
    """Describe a failure of open_clip's factory.

    Args:
        name: the model that was asked for.
        pretrained: its tag or checkpoint.
        error: what open_clip raised; the errors behind it are looked at too.
    """
    asked = f"open_clip could not make {name!r} with pretrained={pretrained!r}"
    cause = " ".join(str(error).split()) or type(error).__name__
    if find_spec("transformers") is None and (isinstance(error, ImportError) or "transformers" in cause):
        return f"{name} needs the text tower or tokenizer of Hugging Face: pip install 'legrad-pipeline[hf]'"
    tag = pretrained or ("null" if ":" in name else "TAG")
    fetch = f"legrad models --fetch {name} {tag}"
    advice = next((advice for link in _chain(error) if (advice := _advice(link, fetch))), None)
    if isinstance(error, ModelLoadError):  # our own, which says what to do
        return f"{asked}: {'; '.join(filter(None, (cause, advice)))}"
    return f"{asked}: {advice or _shortened(cause)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came from; open_clip wraps what its hubs raise."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _advice(error: BaseException, fetch: str) -> str | None:
    if isinstance(error, UnpicklingError):  # its own message advises how to run the code
        return "the checkpoint is damaged, or holds more than weights; code in it is never run"
    if isinstance(error, GatedRepoError):
        return "its files on the Hugging Face hub are for those who accepted their terms: set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face hub has no such repository, or shows it to members alone: set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return (
            "its files are not in this machine's cache, and the Hugging Face hub does not give them now: "
            f"{_shortened(str(error.__cause__))}; try again later, or run `{fetch}` ahead of the job"
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | URLError):
        return (
            "its files are not in this machine's cache and the Hugging Face hub cannot be reached; run "
            f"`{fetch}` where it can, with HF_HOME on storage that this machine sees"
        )
    if isinstance(error, EntryNotFoundError):
        return f"its repository on the Hugging Face hub lacks a file: {_shortened(str(error))}"
    if isinstance(error, HfHubHTTPError):
        return f"the Hugging Face hub refused a file: {_shortened(str(error))}"
    return None


def _shortened(cause: str) -> str:
    """One line, cut between words."""
    words = " ".join(cause.split())
    if len(words) <= MAX_CAUSE_LENGTH:
        return words
    return words[:MAX_CAUSE_LENGTH].rsplit(" ", 1)[0] + " ..."

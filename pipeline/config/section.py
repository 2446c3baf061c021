"""What all sections of the configuration share: strict validation, and the types of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from pipeline.config.classes import one_line

# limit of every number; a float holds every integer up to here
LARGEST_NUMBER = 2**53
# limit of counts of what is made at once, such as threads
LARGEST_COUNT = 2**16


class Section(BaseModel):
    """Settings that refuse unknown keys and never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_another_value(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts true as 1
        if cls.model_fields[str(info.field_name)].annotation is not bool and _any(value, bool):
            raise ValueError("true and false are no values of this key; put quotes around a text")
        return value

    @field_validator("*")
    @classmethod
    def _no_number_beyond_the_limit(cls, value: Any) -> Any:
        if _any(value, (int, float), lambda number: abs(number) > LARGEST_NUMBER):
            raise ValueError(f"the limit is {LARGEST_NUMBER}")
        return value


def _any(value: Any, kind: type | tuple[type, ...], holds: Callable[[Any], bool] = lambda _: True) -> bool:
    """Return whether a value, or one of a list of them, is of a kind and has a property."""
    items = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, kind) and holds(item) for item in items)


def _field_spec(spec: str) -> str:
    extensions, colon, name = spec.partition(":")
    if not all(extension.strip() for extension in extensions.split(";")) or (colon and not name):
        raise ValueError("expected names of fields separated by semicolons, such as jpg;png, or json:NAME")
    return spec


def _filled_line(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text that is not empty")
    return one_line(text)


Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Line = Annotated[str, AfterValidator(_filled_line)]
FieldSpec = Annotated[str, AfterValidator(_field_spec)]

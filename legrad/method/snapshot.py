"""What a model was made of when it was described, so that a later change is noticed; weights are left out."""

from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from legrad.families.modules import written_out

_GLOBAL_HOOKS: tuple[Any, ...] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_UNKNOWN = object()


@dataclass(frozen=True)
class _Part:
    """One module: its class, its children, and its plain attributes, which hold settings and own methods.

    Compared by identity, which is quick; the weights lie in dicts that stay.
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, object]
    values: tuple[object, ...]
    children: tuple[nn.Module | None, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "_Part":
        attributes = dict(vars(module))
        return cls(
            module, type(module), attributes, tuple(attributes.values()), tuple(module._modules.values())
        )

    def is_as_it_was(self) -> bool:
        now = vars(self.module)
        children = now["_modules"].values()
        return (
            type(self.module) is self.kind
            and len(now) == len(self.values)
            and (all(map(is_, now.values(), self.values)) or self._differs_in_training_alone(now))
            and len(children) == len(self.children)
            and all(map(is_, children, self.children))
        )

    def has_hooks(self) -> bool:
        now = vars(self.module)
        return bool(
            now["_forward_hooks"]
            or now["_forward_pre_hooks"]
            or now["_backward_hooks"]
            or now["_backward_pre_hooks"]
        )

    def _differs_in_training_alone(self, now: dict[str, object]) -> bool:
        then = self.attributes
        return all(value is then.get(name, _UNKNOWN) or name == "training" for name, value in now.items())


@dataclass(frozen=True)
class Snapshot:
    """The modules of a vision tower, their settings, hooks and classes, as they were.

    A comparison takes about a microsecond a module: no weight is read, and nothing is run.

    Attributes:
        identity: a number that other modules than these do not have.
    """

    identity: int
    model: _Part
    called: tuple[tuple[nn.Module, type[nn.Module]], ...]
    parts: tuple[_Part, ...]
    classes: tuple[tuple[type, dict[str, object]], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Note what a model with a `visual` tower is made of."""
        visual: Any = model.visual
        parts = tuple(
            _Part.of(module) for module in dict.fromkeys(module for _, module in written_out(visual))
        )
        own = {part.module for part in parts}
        called = tuple((module, type(module)) for module in visual.modules() if module not in own)
        kinds = dict.fromkeys(kind for part in parts for kind in part.kind.__mro__ if kind is not object)
        kinds |= dict.fromkeys(kind for kind in type(model).__mro__ if kind is not object)
        return cls(
            hash(tuple(id(part.module) for part in parts)),
            _Part.of(model),
            called,
            parts,
            tuple((kind, dict(vars(kind))) for kind in kinds),
        )

    def is_of(self, model: nn.Module) -> bool:
        """Whether a model is still made of the same, so that its description still holds."""
        return (
            model is self.model.module
            and not any(_GLOBAL_HOOKS)
            and self.model.is_as_it_was()
            and all(part.is_as_it_was() and not part.has_hooks() for part in self.parts)
            and all(type(module) is kind for module, kind in self.called)
            and all(_is_same_class(kind, names) for kind, names in self.classes)
        )


def _is_same_class(kind: type, names: dict[str, object]) -> bool:
    now = vars(kind)
    return len(now) == len(names) and all(map(is_, now.values(), names.values()))

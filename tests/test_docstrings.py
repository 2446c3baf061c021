"""Docstrings of public functions name every argument and what is returned."""

import dataclasses
import inspect

import pytest

import legrad
import pipeline.training


def public_callables():
    for module in (legrad, pipeline.training):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found):
                yield f"{module.__name__}.{name}", found, found.__doc__
            elif inspect.isclass(found) and not issubclass(found, Exception):
                yield from _methods(f"{module.__name__}.{name}", found)


def _methods(name, cls):
    if not dataclasses.is_dataclass(cls) and "__init__" in vars(cls):
        yield name, cls.__init__, (cls.__doc__ or "") + (cls.__init__.__doc__ or "")
    for key, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function) and not key.startswith("_"):
            yield f"{name}.{key}", function, function.__doc__


@pytest.mark.parametrize(
    ("name", "function", "docstring"), [pytest.param(*entry, id=entry[0]) for entry in public_callables()]
)
def test_the_docstring_names_each_argument_and_what_is_returned(name, function, docstring):
    assert docstring, name
    signature = inspect.signature(function)
    arguments = [argument for argument in signature.parameters if argument not in {"self", "cls"}]
    if len(arguments) > 2:
        assert [
            argument
            for argument in arguments
            if f"\n{argument}: " not in inspect.cleandoc(docstring).replace("    ", "")
        ] == []
        assert signature.return_annotation in {None, "None"} or "Returns:" in docstring

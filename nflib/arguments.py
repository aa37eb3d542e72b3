"""Arguments of public constructors and functions, checked once and in one sentence.

``@checked`` reads the annotations of a function. Each argument is tried when the function is
called, converted if its annotation says so, and refused in a sentence that names what the user
called, the argument, what it may be and what came:

    @checked
    def __init__(self, dim: Size, hidden: Widths = 128) -> None: ...

    MLP(0)      ArgumentError: MLP expects dim to be a whole number of at least 1, got 0.

What relates several arguments (a block that divides a dimension) stands in the function's body.
Libraries that check annotations (beartype, typeguard, pydantic) do not say it in one sentence.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])


class ArgumentError(ValueError):
    """An argument that cannot be what it is for; the message says what was expected."""


@dataclass(frozen=True)
class Rule:
    """What an argument may be.

    Attributes:
        words: the same in words, to stand behind "expects NAME to be".
        accept: returns the value, converted; raises TypeError or ValueError if it is another.
    """

    words: str
    accept: Callable[[Any], Any]


def integer(value: Any) -> int:
    """Whole numbers of Python and NumPy; neither booleans nor floats."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError
    return int(value)


def real(value: Any) -> float:
    """Numbers of Python and NumPy that are not NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise TypeError
    return value if isinstance(value, int | float) else float(value)


def whole(least: int | None = None, odd: bool = False) -> Rule:
    """A whole number, of at least so much."""
    words = "an odd whole number" if odd else "a whole number"

    def accept(value: Any) -> int:
        found = integer(value)
        if least is not None and found < least or odd and found % 2 == 0:
            raise ValueError
        return found

    return Rule(words if least is None else f"{words} of at least {least}", accept)


def number(words: str, allowed: Callable[[float], bool]) -> Rule:
    """A real number in some range."""

    def accept(value: Any) -> float:
        found = real(value)
        if not allowed(found):
            raise ValueError
        return found

    return Rule(words, accept)


def _sequence(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, collections.abc.Sequence):
        raise TypeError
    found = tuple(integer(size) for size in value)
    if not found or min(found) < 1:
        raise ValueError
    return found


def _widths(value: Any) -> tuple[int, ...]:
    return _sequence(value if isinstance(value, collections.abc.Sequence) else (value, value))


def _event(value: Any) -> tuple[int, ...]:
    return _sequence(value if isinstance(value, collections.abc.Sequence) else (value,))


def _sides(value: Any) -> tuple[int, ...]:
    found = _widths(value)
    if len(found) != 2:
        raise ValueError
    return found


def _image(value: Any) -> tuple[int, ...]:
    found = _sequence(value)
    if len(found) != 3:
        raise ValueError
    return found


Whole = Annotated[int, whole()]
Size = Annotated[int, whole(1)]
Count = Annotated[int, whole(0)]
Levels = Annotated[int, whole(2)]
Odd = Annotated[int, whole(1, odd=True)]
Positive = Annotated[float, number("a number above 0", lambda v: v > 0)]
NonNegative = Annotated[float, number("a number of at least 0", lambda v: v >= 0)]
Share = Annotated[float, number("a number from 0 to below 1", lambda v: 0 <= v < 1)]
# An int n stands for two hidden layers of n units, as all defaults have.
Widths = Annotated[
    int | Sequence[int],
    Rule("a width of at least 1, for both hidden layers, or a sequence of widths", _widths),
]
EventSizes = Annotated[
    int | tuple[int, ...],
    Rule("the size of a vector, or a tuple of sizes, each at least 1", _event),
]
Sides = Annotated[
    int | tuple[int, int],
    Rule("a height and a width, each at least 1, or one number for both", _sides),
]
ImageShape = Annotated[
    tuple[int, ...], Rule("the shape (channels, height, width) of an image", _image)
]
ContextShape = Annotated[
    int | tuple[int, ...] | None,
    Rule(
        "the size of a context vector, a shape (channels, height, width), or None",
        lambda value: None if value is None else _event(value),
    ),
]


def checked(function: F) -> F:
    """The function, whose arguments are checked by their annotations when it is called.

    It costs microseconds a call, so it belongs on constructors and commands, not on what runs in
    every step. Annotations that are no rule, no class and no choice of these are not checked.

    Raises: ArgumentError at the first argument that is refused.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)
    is_method = names[:1] == ["self"]
    rules: dict[str, Rule] = {}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not rules:
            rules.update(_rules(function, signature))
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            bound = None
        if bound is None:
            return function(*args, **kwargs)  # Python's own sentence names the function
        for name, value in bound.arguments.items():
            rule = rules.get(name)
            if rule is None or value is signature.parameters[name].default is None:
                continue
            try:
                bound.arguments[name] = rule.accept(value)
            except (TypeError, ValueError):
                who = _who(function, args) if is_method else function.__name__
                raise ArgumentError(
                    f"{who} expects {name} to be {rule.words}, got {show(value)}."
                ) from None
        return function(*bound.args, **bound.kwargs)

    return run  # type: ignore[return-value]


def _who(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """The class that is made, or the method that is called."""
    kind = type(args[0]).__name__
    return kind if function.__name__ == "__init__" else f"{kind}.{function.__name__}"


def show(value: Any) -> str:
    """A value as it stands in a sentence: short, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__} (make an object of it: {value.__name__}(...))"
    if isinstance(value, nn.Module) or callable(value):
        return f"{'an object of' if hasattr(value, '__dict__') else 'a'} {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rules(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Rule]:
    # Annotations are strings; what they name may be imported for type checkers only.
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError:
        hints = {}
    found = {"": Rule("", lambda value: value)}  # so that it is never empty again
    for name, parameter in signature.parameters.items():
        is_known = name in hints and parameter.kind is not parameter.VAR_KEYWORD
        rule = _rule(hints[name]) if is_known else None
        if rule is not None:
            found[name] = _each(rule) if parameter.kind is parameter.VAR_POSITIONAL else rule
    return found


def _each(rule: Rule) -> Rule:
    """The rule of ``*names``."""
    return Rule(f"{rule.words} each", lambda values: tuple(map(rule.accept, values)))


def _rule(hint: Any) -> Rule | None:
    """The rule that an annotation means, or None if it means none."""
    if hint is Any:  # a class, in some versions of Python
        return None
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Rule):
            return extra
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        words = ", ".join(map(repr, choices[:-1])) + " or " * (len(choices) > 1) + repr(choices[-1])
        return Rule(words, lambda value: _among(value, choices))
    if origin in (Union, types.UnionType):
        return _either(typing.get_args(hint))
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        return Rule("a function or a class to call", _callable)
    if hint is bool:
        return Rule("True or False", lambda value: _instance(value, (bool,)))
    if hint is int:
        return whole()
    if hint is float:
        return number("a number", lambda value: True)
    if hint is type(None):
        return Rule("None", lambda value: _instance(value, (type(None),)))
    # Protocols that cannot be asked, and Any, are left to the function.
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False) and origin is None:
        return Rule(f"{_article(hint.__name__)} {hint.__name__}", lambda v: _instance(v, (hint,)))
    return None


def _either(hints: Sequence[Any]) -> Rule | None:
    parts = [_rule(hint) for hint in hints]
    rules = [part for part in parts if part is not None]
    if len(rules) < len(parts):
        return None

    def accept(value: Any) -> Any:
        for rule in rules:
            try:
                return rule.accept(value)
            except (TypeError, ValueError):
                continue
        raise ValueError

    return Rule(" or ".join(rule.words for rule in rules), accept)


def _among(value: Any, choices: tuple[Any, ...]) -> Any:
    if not isinstance(value, str):
        value = integer(value)
    if value not in choices:
        raise ValueError
    return value


def _instance(value: Any, kinds: tuple[type, ...]) -> Any:
    if not isinstance(value, kinds):
        raise TypeError
    return value


def _callable(value: Any) -> Any:
    # A network that stands already is callable, too, but makes none.
    if not callable(value) or isinstance(value, nn.Module):
        raise TypeError
    return value


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOUaeiou" else "a"

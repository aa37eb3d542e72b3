"""Arguments: each rule takes what it should, converts it, and refuses the rest in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy
import pytest
import torch
from torch import Tensor, nn

from nflib import arguments
from nflib.arguments import ArgumentError, checked
from nflib.linear import LU

NAN, INF = math.nan, math.inf

# What is taken, with what it becomes; what is refused; the sentence's words.
RULES: dict[str, tuple[list[tuple[Any, Any]], list[Any], str]] = {
    "Whole": ([(-3, -3), (numpy.int64(2), 2)], [True, 2.0, "2", None], "a whole number"),
    "Size": (
        [(1, 1), (7, 7), (numpy.int32(2), 2)],
        [0, -1, True, 1.0, "1", (1,), None],
        "a whole number of at least 1",
    ),
    "Count": ([(0, 0), (3, 3)], [-1, False, 0.5], "a whole number of at least 0"),
    "Levels": ([(2, 2), (256, 256)], [1, 0, 2.0], "a whole number of at least 2"),
    "Odd": ([(1, 1), (5, 5)], [0, 2, -1, 3.0], "an odd whole number of at least 1"),
    "Positive": (
        [(1, 1), (0.5, 0.5), (INF, INF), (numpy.float32(2), 2.0)],
        [0, 0.0, -1, NAN, True, "1", None],
        "a number above 0",
    ),
    "NonNegative": ([(0, 0), (0.1, 0.1)], [-0.1, NAN, False], "a number of at least 0"),
    "Share": ([(0, 0), (0.99, 0.99)], [1, 1.0, -0.1, NAN], "a number from 0 to below 1"),
    "Widths": (
        [(8, (8, 8)), ([3], (3,)), ((4, 5, 6), (4, 5, 6)), (numpy.int64(2), (2, 2))],
        [0, (), [], (4, 0), (4, 2.0), "8", "88", 8.0, None, True],
        "a width of at least 1, for both hidden layers, or a sequence of widths",
    ),
    "EventSizes": (
        [(3, (3,)), ((1, 8, 8), (1, 8, 8)), ([2, 2], (2, 2))],
        [0, (), (2, 0), "3", 3.0, None],
        "the size of a vector, or a tuple of sizes, each at least 1",
    ),
    "Sides": (
        [(4, (4, 4)), ((2, 3), (2, 3))],
        [0, (2,), (2, 3, 4), "2", (2, 0)],
        "a height and a width, each at least 1, or one number for both",
    ),
    "ImageShape": (
        [((1, 8, 8), (1, 8, 8)), ([3, 4, 5], (3, 4, 5))],
        [8, (8, 8), (1, 1, 8, 8), (1, 0, 8), "188", None],
        "the shape (channels, height, width) of an image",
    ),
    "ContextShape": (
        [(None, None), (2, (2,)), ((1, 4, 4), (1, 4, 4))],
        [0, (), (0,), "2", 1.5],
        "the size of a context vector, a shape (channels, height, width), or None",
    ),
}
CASES = [(name, value, made) for name, (taken, _, _) in RULES.items() for value, made in taken]
REFUSED = [(name, value) for name, (_, refused, _) in RULES.items() for value in refused]


def taking(hint: Any) -> Callable[[Any], Any]:
    """A function ``call(value)`` that returns its argument as it arrives."""

    def call(value: Any) -> Any:
        return value

    call.__annotations__ = {"value": hint}
    return checked(call)


@pytest.mark.parametrize(("name", "value", "made"), CASES)
def test_what_fits_is_taken_and_converted(name: str, value: Any, made: Any) -> None:
    found = taking(getattr(arguments, name))(value)
    assert found == made
    assert type(found) is type(made)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_does_not_fit_is_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        taking(getattr(arguments, name))(value)
    words = RULES[name][2]
    assert str(caught.value) == f"call expects value to be {words}, got {value!r}."


class Net(nn.Module):
    @checked
    def __init__(
        self,
        size: arguments.Size,
        flag: bool = False,
        mode: Literal["a", "b"] = "a",
        weight: Tensor | None = None,
        scale: float = 1.0,
        make: Callable[[], nn.Module] = nn.ReLU,
        inner: LU | None = None,
        *rest: int,
    ) -> None:
        super().__init__()
        self.size, self.rest = size, rest

    @checked
    def grow(self, by: arguments.Size, until: arguments.Size = None) -> int:  # type: ignore[assignment]
        return self.size + by


class Child(Net):
    pass


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 0}, "size to be a whole number of at least 1, got 0"),
        ({"flag": 1}, "flag to be True or False, got 1"),
        ({"mode": "c"}, "mode to be 'a' or 'b', got 'c'"),
        ({"mode": ["a"]}, r"mode to be 'a' or 'b', got \['a'\]"),
        ({"weight": 3}, "weight to be a Tensor or None, got 3"),
        ({"weight": torch.zeros(2), "scale": "x"}, "scale to be a number, got 'x'"),
        ({"scale": NAN}, "scale to be a number, got nan"),
        ({"scale": torch.zeros(2, 3)}, r"scale to be a number, got a tensor of shape \(2, 3\)"),
        ({"make": nn.ReLU()}, "make to be a function or a class to call, got an object of ReLU"),
        ({"make": 2}, "make to be a function or a class to call, got 2"),
        ({"inner": LU}, r"inner to be a LU or None, got the class LU \(make an object of it: LU"),
        ({"inner": nn.Linear(1, 1)}, "inner to be a LU or None, got an object of Linear"),
    ],
)
def test_a_class_is_named_with_its_argument(wrong: dict[str, Any], words: str) -> None:
    for kind in (Net, Child):
        with pytest.raises(ArgumentError, match=f"^{kind.__name__} expects {words}.*\\.$"):
            kind(**{"size": 1} | wrong)


def test_right_arguments_pass_in_any_way() -> None:
    net = Net(numpy.int64(3), True, "b", torch.zeros(1), 2, nn.Tanh, LU(2), 5, numpy.int64(6))
    assert net.rest == (5, 6)
    assert [type(k) for k in net.rest] == [int, int]
    assert type(net.size) is int
    assert Net(size=2, weight=None, inner=None).size == 2


def test_a_method_is_named_with_its_class() -> None:
    net = Net(2)
    assert net.grow(3) == 5
    assert net.grow(3, None) == 5  # a default may be None, whatever the annotation says
    with pytest.raises(ArgumentError, match=r"^Net\.grow expects by to be .*, got 0\.$"):
        net.grow(0)


def test_each_of_many_arguments_is_checked() -> None:
    given = (1, False, "a", None, 1.0, nn.ReLU, None)
    for rest in (("x",), (1, 2.5), (1, True)):
        with pytest.raises(ArgumentError, match="^Net expects rest to be a whole number each, got"):
            Net(*given, *rest)  # type: ignore[arg-type]


def test_a_choice_is_of_one_type() -> None:
    pick = taking(Literal[1, 2])
    assert pick(2) == 2
    for wrong in (True, 1.0, "1", 3):
        with pytest.raises(ArgumentError, match="value to be 1 or 2, got"):
            pick(wrong)


def test_one_of_several_kinds_is_tried_after_the_other() -> None:
    pick = taking(arguments.Size | str | None)
    assert [pick(value) for value in (numpy.int8(3), "x", None)] == [3, "x", None]
    with pytest.raises(ArgumentError, match="of at least 1 or a str or None, got 0"):
        pick(0)


def test_what_has_no_rule_is_left_to_the_function() -> None:
    assert taking(list[int])("anything") == "anything"
    assert taking(Tensor | list[int])("anything") == "anything"
    assert taking(Any)(3) == 3


def test_a_missing_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Net()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise'"):
        Net(sise=3)  # type: ignore[call-arg]


def test_a_long_value_is_cut_and_stands_on_one_line() -> None:
    with pytest.raises(ArgumentError) as caught:
        Net(list(range(1000)))  # type: ignore[arg-type]
    assert str(caught.value).endswith("...].") or str(caught.value).endswith("....")
    assert len(str(caught.value)) < 130
    with pytest.raises(ArgumentError, match="got array"):
        Net(numpy.zeros((3, 3)))  # type: ignore[arg-type]
    assert "\n" not in arguments.show(numpy.zeros((3, 3)))


def test_a_checked_function_keeps_its_name_and_its_words() -> None:
    assert Net.grow.__name__ == "grow"
    assert LU.__init__.__doc__ == LU.__init__.__wrapped__.__doc__  # type: ignore[attr-defined]

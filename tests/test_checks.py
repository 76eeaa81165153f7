"""Tests of the checks: what passes, what does not, and the sentences."""

import math
import re

import pytest
import torch

from spikezoo.checks import choice, finite, is_number, is_whole, nearest, number, switch, whole


@pytest.mark.parametrize("value", [True, False, "3", 3.0, None, math.nan, [3], 0])
def test_whole_refuses(value):
    assert not is_whole(value)
    with pytest.raises(ValueError, match=re.escape(f"T={value!r}: expected an integer >= 1. More.")):
        whole("T", value, hint=" More.")


def test_whole():
    assert whole("T", 3) == 3 and whole("T", 0, 0) == 0 and whole("seed", 2**31 - 1, 0, 2**31 - 1) == 2**31 - 1
    for value, low, high, bounds in ((2**31, 0, 2**31 - 1, "0 to 2**31 - 1"), (0, 1, 7, "1 to 7"), (8, 1, 7, "1 to 7")):
        with pytest.raises(ValueError, match=re.escape(f"n={value}: expected an integer from {bounds}.")):
            whole("n", value, low, high)
    with pytest.raises(ValueError, match=r"^n=0: expected epochs\.$"):
        whole("n", 0, expected="epochs")


@pytest.mark.parametrize("value", [True, "0.5", None, math.nan, math.inf, -math.inf, [0.5]])
def test_number_refuses(value):
    assert not is_number(value)
    with pytest.raises(ValueError, match=re.escape(f"x={value!r}: expected a finite number.")):
        number("x", value)


def test_number():
    assert number("x", 0, 0, 1) == 0 and number("x", 1, 0, 1, "[]") == 1 and number("x", 10**400) == 10**400
    sentences = (
        (1, (0, 1), "a number in [0, 1)"),
        (1.5, (0, 1, "[]"), "a number in [0, 1]"),
        (0, (0, 1, "()"), "a number in (0, 1)"),
        (0, (0, math.inf, "()"), "a positive number"),
    )
    for value, arguments, wanted in sentences:
        with pytest.raises(ValueError, match=re.escape(f"x={value}: expected {wanted}.")):
            number("x", value, *arguments)


def test_choice_and_switch():
    assert choice("reset", "soft", ("hard", "soft")) == "soft" and switch("on", True) and not switch("on", False)
    with pytest.raises(ValueError, match=re.escape("reset='sofd' does not exist. Did you mean 'soft'?")):
        choice("reset", "sofd", ("hard", "soft"))
    for value in (["soft"], None, True):
        with pytest.raises(ValueError, match=re.escape(f"reset={value!r}: expected one of 'hard', 'soft'.")):
            choice("reset", value, ("hard", "soft"))
    for value in ("false", 0, 1, None):
        with pytest.raises(ValueError, match=re.escape(f"on={value!r}: expected True or False.")):
            switch("on", value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_finite(dtype):
    x = torch.full((3, 2, 4), torch.finfo(dtype).max, dtype=dtype)
    assert finite(x) is x and finite(torch.ones(3, 1, dtype=torch.uint8)).all()
    for bad in (math.nan, math.inf, -math.inf):
        x[2, 1, 0] = bad
        with pytest.raises(
            ValueError, match="Frames with values that are not finite in 1 of 3 samples, the first at 2"
        ):
            finite(x, "Frames")
    x[1, 0, 0], x[2, 1, 1] = math.inf, -math.inf
    with pytest.raises(ValueError, match="Input with values that are not finite in 2 of 3 samples, the first at 1"):
        finite(x)


def test_nearest():
    assert nearest("sofd", ("soft", "hard")) == "Did you mean 'soft'?"
    assert nearest("t", ("tau", "T", "threshold")) == "Did you mean 'T' or 'tau'?"
    assert nearest("xyz", {"soft", "hard"}) == "Valid: hard, soft."

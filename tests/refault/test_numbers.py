import argparse

import pytest

from refault.numbers import number, size


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("64M", 64 << 20), ("1GiB", 1 << 30), ("24mb", 24 << 20), ("8 K", 8192)],
)
def test_sizes(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "M", "64Q", "0", "-1M", "1.5M", "4095", "1000", "0x1000"])
def test_what_is_no_size_says_so(text):
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_numbers_are_decimal_or_hexadecimal():
    assert (number("42"), number("0x2a")) == (42, 42)
    for text in ("", "x", "-1", "1.0"):
        with pytest.raises(argparse.ArgumentTypeError):
            number(text)

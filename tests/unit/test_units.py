"""Units are parsed exactly and printed with their own names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.units import (
    format_bytes,
    format_count,
    format_flops,
    format_money,
    format_seconds,
    format_share,
    parse_bytes,
    parse_count,
    parse_flops,
    parse_money,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24 GiB", 24 * 2**30),
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("0.1 GB", 10**8),
        ("512 MiB", 2**29),
        ("1 TiB", 2**40),
        ("2e9", 2 * 10**9),
        ("1_000 B", 1000),
        ("0", 0),
    ],
)
def test_bytes_are_parsed_exactly(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1 GiB", "24 G", "24 GiBB", "1e99", "1e999999999", "nan", "1 2", "x" * 99]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(PlannerError) as caught:
        parse_bytes(text)
    assert str(caught.value).isprintable()


def test_bare_prefix_names_both_readings() -> None:
    with pytest.raises(PlannerError, match=r"GiB.*GB"):
        parse_bytes("80G")


@pytest.mark.parametrize(
    ("size", "unit", "text"),
    [
        (2**30, "GiB", "1.00 GiB"),
        (10**9, "GB", "1.00 GB"),
        (2**30, "GB", "1.07 GB"),
        (0, "GiB", "0 B"),
        (512, "GiB", "512 B"),
        (131_072, "GiB", "128.00 KiB"),
        (131_072, "GB", "131.07 kB"),
        (-(2**30), "GiB", "-1.00 GiB"),
        (2**41, "GiB", "2,048.00 GiB"),
        (2**20, "KiB", "1,024.00 KiB"),
    ],
)
def test_bytes_are_printed(size: int, unit: str, text: str) -> None:
    assert format_bytes(size, unit) == text  # pyright: ignore[reportArgumentType]


def test_unknown_unit_is_refused() -> None:
    with pytest.raises(PlannerError, match="GiB"):
        format_bytes(1, "Gib")  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 2**50))
def test_bytes_survive_printing_and_parsing(size: int) -> None:
    assert parse_bytes(f"{size} B") == size
    printed = format_bytes(size, "GiB", digits=6)
    assert abs(parse_bytes(printed.replace(",", "")) - size) <= max(1, 2**30 * 1e-6)


@given(st.integers(1, 10**15))
def test_no_size_is_printed_as_zero(size: int) -> None:
    assert not format_bytes(size).startswith("0.00")


def test_counts() -> None:
    assert parse_count("15T") == parse_count("15e12 tokens") == 15 * 10**12
    assert parse_count("0.5 B") == 5 * 10**8
    assert format_count(999_999_999) == "1.00B"
    assert format_count(1) == "1"
    for wrong in ("1.5", "15X", "T", "-3", "15 T T"):
        with pytest.raises(PlannerError):
            parse_count(wrong)


def test_seconds() -> None:
    assert parse_seconds("90 min") == 5400
    assert parse_seconds("2 weeks") == 14 * 86400
    assert format_seconds(0) == "0 s"
    assert format_seconds(0.25) == "250.00 ms"
    assert format_seconds(129_600) == "36.00 h"
    with pytest.raises(PlannerError):
        parse_seconds("3 fortnights")


def test_operations_and_money_and_shares() -> None:
    assert parse_flops("1 PFLOP/s") == 1e15
    assert format_flops(12) == "12 FLOP"
    assert parse_money("$1_000") == 1000
    assert format_money(-2.5) == "-$2.50"
    assert format_share(1) == "100.0 %"
    for parse, wrong in ((parse_flops, "3 horses"), (parse_money, "3 EUR")):
        with pytest.raises(PlannerError):
            parse(wrong)

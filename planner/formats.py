"""Number formats: how many bits one element takes, and what its scales add."""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import UnknownName, nearest

__all__ = ["BITS", "bits_of", "promote"]

# Bits of one element as torch stores it. Formats that carry scales beside the elements are in `planner.quantization`.
BITS: Mapping[str, int] = {
    "fp64": 64,
    "int64": 64,
    "fp32": 32,
    "int32": 32,
    "tf32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8": 8,
    "int8": 8,
    "uint8": 8,
    "bool": 8,
    "int4": 4,
}

_RANK = {"bool": 0, "int8": 1, "int32": 2, "int64": 3, "fp8": 4, "bf16": 5, "fp16": 5, "fp32": 6, "fp64": 7}


def bits_of(name: str) -> int:
    """Bits of one element of format `name`. Raises UnknownName."""
    try:
        return BITS[name]
    except KeyError:
        raise UnknownName(f'"{name}" is not a number format; {nearest(name, BITS)}') from None


def promote(first: str, second: str) -> str:
    """The format of an operation on two tensors, by torch's promotion rules (bf16 with fp16 gives fp32).

    >>> promote("bf16", "fp32"), promote("bf16", "fp16")
    ('fp32', 'fp32')
    """
    if first == second:
        return first
    if {first, second} == {"bf16", "fp16"}:
        return "fp32"
    return first if _RANK[first] >= _RANK[second] else second

"""What a device's used memory is made of, from an answer's memory section: for figures, tables and reports alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["device_parts"]


def device_parts(memory: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by name that add up to `device_used`: tensors at the peak, then what lies outside them; nothing empty.

    memory: the `memory` section of `Estimate.to_dict()`. In a training answer the allocator's slack is what
    `peak_reserved` has beyond `peak_allocated`, which is less than its term where the capacity cuts it off. A serving
    answer's breakdown holds everything already.
    """
    parts = {name: int(size) for name, size in memory["breakdown"].items()}
    for name, term in (memory.get("device_terms") or {}).items():
        reserved = memory["peak_reserved"] - memory["peak_allocated"]
        parts[name] = reserved if name == "allocator_slack" else int(term["bytes"])
    return {name: size for name, size in parts.items() if size}

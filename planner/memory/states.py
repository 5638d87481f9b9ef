"""What outlives a step: weights and gradients, tensor by tensor, each allocation rounded as the allocator rounds it."""

from __future__ import annotations

from collections.abc import Iterable

from planner.formats import BITS
from planner.ledger.parameters import StateTensor, four_bit_bytes, state_tensors
from planner.ledger.tape import allocated_bytes
from planner.plan import Method

__all__ = ["StateTensor", "gradient_bytes", "state_tensors", "weight_bytes"]


def weight_bytes(tensors: Iterable[StateTensor], method: Method) -> int:
    """Allocated bytes of the weights themselves."""
    total = 0
    for tensor in tensors:
        if tensor.packed:
            size = four_bit_bytes(tensor.elements, double_quantization=method.double_quantization)
        else:
            size = allocated_bytes(tensor.elements * BITS[tensor.dtype] // 8)
        total += tensor.repeat * size
    return total


def gradient_bytes(tensors: Iterable[StateTensor], dtype: str | None = None) -> int:
    """Allocated bytes of one gradient for each trained tensor, in its own format or in `dtype`."""
    return sum(
        tensor.repeat * allocated_bytes(tensor.elements * BITS[dtype or tensor.dtype] // 8)
        for tensor in tensors
        if tensor.trainable
    )

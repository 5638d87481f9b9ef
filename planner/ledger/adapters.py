"""Adapters beside frozen weights: LoRA and its kin, as peft computes them.

Letters: r rank.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.plan import Method

__all__ = ["adapter_for", "is_target"]

Adapter = Callable[[Operations, str, Tensor, str, Tensor], Tensor]


def is_target(method: Method, name: str) -> bool:
    """Whether the linear `name` (a module path) carries an adapter. `all-linear` leaves out the output head."""
    leaf = name.rpartition(".")[2]
    if "all-linear" in method.targets:
        return leaf != "lm_head"
    return leaf in method.targets or name in method.targets


def adapter_for(method: Method) -> Adapter | None:
    """What the method does to a targeted linear's product; None when it does nothing."""
    if method.name not in ("lora", "qlora"):
        return None

    def apply(t: Operations, name: str, x: Tensor, out: str, result: Tensor) -> Tensor:
        return _lora(t, method, name, x, out, result) if is_target(method, name) else result

    return apply


def _lora(t: Operations, method: Method, name: str, x: Tensor, out: str, result: Tensor) -> Tensor:
    """result + scaling * B(A(dropout(x.to(adapter dtype)))), then back to the product's format.

    peft/tuners/lora/layer.py, Linear.forward. With fp32 adapters beside a 16-bit weight: x is copied to fp32 and kept
    for A's gradient, and four fp32 tensors as wide as the output pass by before the sum is cast back.
    """
    if t.quantized(name) and t.profile.name != "litgpt":
        return _lora_4bit(t, method, name, x, out, result)
    dtype = result.dtype
    down, up = f"{name}.lora_A", f"{name}.lora_B"
    rank = t.dim("r", method.rank)
    first = t.weight(f"{down}.weight", (rank, x.dims[-1]), dtype=method.adapter_dtype, trainable=True)
    second = t.weight(f"{up}.weight", (out, rank), dtype=method.adapter_dtype, trainable=True)
    x = t.to(x, method.adapter_dtype)
    x = t.dropout(x, method.dropout)
    result = t.add(
        result,
        t.scale(t.product(t.product(x, first, (*x.dims[:-1], rank)), second, (*x.dims[:-1], out)), "scaling"),
    )
    return t.to(result, dtype)


def _lora_4bit(t: Operations, method: Method, name: str, x: Tensor, out: str, result: Tensor) -> Tensor:
    """result.clone() + scaling * B(A(dropout(x))): peft/tuners/lora/bnb.py, Linear4bit.forward.

    Outside autocast x is turned to the adapters' format and the product back; inside it, neither is.
    """
    result = t.copy(result, operator="clone")
    down, up = f"{name}.lora_A", f"{name}.lora_B"
    rank = t.dim("r", method.rank)
    first = t.weight(f"{down}.weight", (rank, x.dims[-1]), dtype=method.adapter_dtype, trainable=True)
    second = t.weight(f"{up}.weight", (out, rank), dtype=method.adapter_dtype, trainable=True)
    if t.compute is None:
        x = t.to(x, method.adapter_dtype)
    x = t.dropout(x, method.dropout)
    output = t.product(t.product(x, first, (*x.dims[:-1], rank)), second, (*x.dims[:-1], out))
    output = t.scale(output, "scaling")
    if t.compute is None:
        output = t.to(output, result.dtype)
    return t.add(result, output)

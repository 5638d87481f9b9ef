"""Adapters beside frozen weights: LoRA and its kin, as peft computes them.

Letters: r rank.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.ledger.dora import adapt_with_magnitude
from planner.ledger.ia3 import scale_input, scale_output, scales_input
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.plan import Method

__all__ = ["adapter_for", "is_target", "preparation_for"]

Adapter = Callable[[Operations, str, Tensor, str, Tensor], Tensor]
Preparation = Callable[[Operations, str, Tensor], tuple[Tensor, Tensor] | None]


def is_target(method: Method, name: str, head: str = "lm_head") -> bool:
    """Whether the linear `name` (a module path) carries an adapter.

    A target is a module path or the end of one, as in peft (tuners_utils.py, check_target_module_exists);
    `all-linear` leaves out the output projection, `head`.
    """
    if "all-linear" in method.targets:
        return name != head
    return any(name == target or name.endswith(f".{target}") for target in method.targets)


def adapter_for(method: Method, head: str = "lm_head") -> Adapter | None:
    """What the method does to a targeted linear's product; None when it does nothing."""
    if method.name == "ia3":

        def scale(t: Operations, name: str, x: Tensor, out: str, result: Tensor) -> Tensor:
            scaled = is_target(method, name, head) and not scales_input(name)
            return scale_output(t, method, name, result) if scaled else result

        return scale
    if method.name not in ("lora", "qlora"):
        return None

    def apply(t: Operations, name: str, x: Tensor, out: str, result: Tensor) -> Tensor:
        return _lora(t, method, name, x, out, result) if is_target(method, name, head) else result

    return apply


def preparation_for(method: Method, head: str = "lm_head") -> Preparation | None:
    """What the method does to a targeted linear's input; None when it does nothing."""
    if method.name != "ia3":
        return None

    def prepare(t: Operations, name: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        scaled = is_target(method, name, head) and scales_input(name)
        return scale_input(t, method, name, x) if scaled else None

    return prepare


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
    if method.dora:
        return t.to(t.add(result, adapt_with_magnitude(t, method, name, x, result, first, second)), dtype)
    low = (*x.dims[:-1], rank)
    result = t.add(
        result,
        t.scale(t.product(t.product(t.dropout(x, method.dropout), first, low), second, result.dims), "scaling"),
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
    if method.dora:
        adapted = t.add(result, adapt_with_magnitude(t, method, name, x, result, first, second))
        return t.to(adapted, result.dtype) if t.compute is None else adapted
    low = (*x.dims[:-1], rank)
    output = t.product(t.product(t.dropout(x, method.dropout), first, low), second, result.dims)
    output = t.scale(output, "scaling")
    if t.compute is None:
        output = t.to(output, result.dtype)
    return t.add(result, output)

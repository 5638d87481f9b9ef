"""DoRA (arXiv:2402.09353): LoRA whose result is rescaled by a trained magnitude over the norm of the adapted weight.

As peft 0.21 computes it: tuners/lora/dora.py, DoraLinearLayer.forward, and lora/variants.py, DoraLinearVariant. The
norm is taken anew in each forward pass and receives no gradient, as section 4.3 of the paper proposes; the matrices
that it needs exist only while the module runs:

    identity (in, in), A's product of it (in, r), B's product of that (in, out), the base weight in the adapters'
    format (out, in), the scaled delta (out, in) and the sum (out, in)

Letters: r rank.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Dims, Parameter, Storage, Tensor
from planner.plan import Method

__all__ = ["adapt_with_magnitude"]


def adapt_with_magnitude(
    t: Operations, method: Method, name: str, x: Tensor, result: Tensor, first: Parameter, second: Parameter
) -> Tensor:
    """What DoRA adds to the base product `result`, in the adapters' format. x: the input in that format.

    Without dropout the base product is used again; with it, the base weight meets the dropped input once more.
    """
    x = t.dropout(x, method.dropout)
    delta, graph = _delta(t, first, second)
    magnitude = t.weight(f"{name}.lora_magnitude_vector.weight", (second.dims[0],), dtype=first.dtype, trainable=True)
    weight = _base_weight(t, name, x)
    norm = _norm(t, weight, delta)
    (ratio,) = t.apply("div", [magnitude, norm], [(norm.dims, magnitude.dtype)], saves=[norm])
    dims = (*x.dims[:-1], second.dims[0])
    low_rank = t.product(t.product(x, first, (*x.dims[:-1], first.dims[0])), second, dims)
    offset = t.known_weight(f"{name}.bias")
    if method.dropout:
        base = _product_with(t, x, weight, dims)
    elif offset is not None:
        base = t.apply("sub", [result, offset], [(dims, result.dtype)], alias=[True, False])[0]
    else:
        base = result
    added = t.add(
        t.mul(t.scale(ratio, "sub scalar"), base, dims),
        t.scale(t.mul(ratio, low_rank, dims), "scaling"),
    )
    del graph
    return added


def _delta(t: Operations, first: Parameter, second: Parameter) -> tuple[Tensor, list[Storage]]:
    """B(A(identity)), detached, and what its graph holds as long as the module runs; nothing comes back through it."""
    if t.compute is not None and t.compute != first.dtype:
        t.cast(first)  # both are cached with their graph, which the products below do without
        t.cast(second)
    enabled, t.enabled = t.enabled, False
    inner, rank, out = first.dims[1], first.dims[0], second.dims[0]
    identity = t.constant("eye", (inner, inner), first.dtype)
    identity = t.to(identity, t.compute or first.dtype)
    middle = t.product(identity, first, (inner, rank))
    graph = [identity.storage, middle.storage] if enabled else []
    del identity
    delta = t.to(t.product(middle, second, (inner, out)), first.dtype)
    t.enabled = enabled
    return delta, graph


def _base_weight(t: Operations, name: str, x: Tensor) -> Tensor | Parameter:
    """The base weight in the format of x: itself, or a copy; a 4-bit one is unpacked first."""
    weight = t.known_weight(f"{name}.weight")
    assert weight is not None, "the base product has declared it"
    if t.quantized(name):
        unpacked = t.constant("dequantize 4-bit", weight.dims, t.packed_from)
        return t.to(unpacked, x.dtype)
    return weight if weight.dtype == x.dtype else t.constant("to", weight.dims, x.dtype)


def _product_with(t: Operations, x: Tensor, weight: Tensor | Parameter, dims: Dims) -> Tensor:
    """x @ weight.T of a frozen weight: a copy of it is kept for the gradient of x."""
    if isinstance(weight, Parameter):
        return t.product(x, weight, dims)
    if t.compute is not None:
        x, weight = t.to(x, t.compute), t.to(weight, t.compute)
    kept = weight if x.requires_grad else None
    return t.apply("linear", [x, weight], [(dims, x.dtype)], saves=[kept], viewed=True)[0]


def _norm(t: Operations, weight: Tensor | Parameter, delta: Tensor) -> Tensor:
    """||W + scaling * B A|| of each row."""
    dims, dtype = weight.dims, delta.dtype
    scaled = t.constant("scaling", dims, dtype)
    total = t.constant("add", dims, dtype)
    del scaled
    norm = t.constant("norm", dims[:1], dtype)
    del total
    return norm

"""Bottleneck adapters (Houlsby et al., arXiv:1902.00751): a small network at the end of each of a block's two branches.

    branch + dropout(up(gelu(down(branch))))        down (m, H) and up (H, m), with biases

It stands right before the branch is added to the residual stream, after the block's own dropout: where the authors'
code has it (google-research/adapter-bert, modeling.py, feedforward_adapter; GELU and m = 64 are its defaults). Norms
stay frozen. The adapter computes in its own format and is cast back, as LoRA's is. LLaMA-Adapter, which other tools
call `adapter` too, is a different method and is not described here.

Letters: H hidden, m width of the bottleneck.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.plan import Method

__all__ = ["ADAPTER_NAMES", "adapter_shapes", "bottleneck"]

ADAPTER_NAMES = ("adapter_mixer", "adapter_ffn")


def adapter_shapes(name: str, hidden: int, width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The four tensors of one adapter: 2 m H + m + H elements."""
    return (
        (f"{name}.down.weight", (width, hidden)),
        (f"{name}.down.bias", (width,)),
        (f"{name}.up.weight", (hidden, width)),
        (f"{name}.up.bias", (hidden,)),
    )


def bottleneck(t: Operations, method: Method, name: str, x: Tensor) -> Tensor:
    """The branch x with its adapter's answer added."""
    t.module = name
    hidden, width, dtype = x.dims[-1], t.dim("m", method.bottleneck), method.adapter_dtype
    down = t.weight(f"{name}.down.weight", (width, hidden), dtype=dtype, trainable=True)
    down_bias = t.weight(f"{name}.down.bias", (width,), dtype=dtype, trainable=True)
    up = t.weight(f"{name}.up.weight", (hidden, width), dtype=dtype, trainable=True)
    up_bias = t.weight(f"{name}.up.bias", (hidden,), dtype=dtype, trainable=True)
    inner = t.map("gelu", t.product(t.to(x, dtype), down, (*x.dims[:-1], width), down_bias))
    return t.add(x, t.to(t.dropout(t.product(inner, up, x.dims, up_bias), method.dropout), x.dtype))

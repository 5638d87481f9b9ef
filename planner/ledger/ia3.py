"""(IA)^3 (arXiv:2205.05638): trained vectors that scale keys, values and the input of the feed-forward's last product.

As peft 0.21 computes it: tuners/ia3/layer.py, Linear.forward, and ia3/bnb.py, Linear4bit.forward. The vectors are fp32
beside 16-bit weights, so each product with one is an fp32 tensor as wide as what it scales:

    scaled outputs (keys, values)       kept: the output, in its own format
    scaled inputs (feed-forward)        kept: the input's fp32 copy
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.plan import Method

__all__ = ["scale_input", "scale_output", "scales_input"]

# The last product of each feed-forward: TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING in peft's constants.py,
# and those of DistilBERT and ModernBERT, which it leaves to `feedforward_modules`.
_FEED_FORWARD = (
    "down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "output.dense", "w2", "wo",
    "lin2", "mlp.Wo",
)  # fmt: skip


def scales_input(name: str) -> bool:
    """Whether the vector of the linear `name` scales its input rather than its output."""
    return name.endswith(_FEED_FORWARD)


def scale_input(t: Operations, method: Method, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled input in the format of x, and the copy of x that a local variable of the module keeps."""
    dtype = x.dtype
    vector = _vector(t, method, name, x.dims[-1])
    x = t.to(x, method.adapter_dtype)
    return t.to(t.mul(x, vector, x.dims), dtype), x


def scale_output(t: Operations, method: Method, name: str, result: Tensor) -> Tensor:
    """The scaled output, back in its format."""
    vector = _vector(t, method, name, result.dims[-1])
    return t.to(t.mul(result, vector, result.dims), result.dtype)


def _vector(t: Operations, method: Method, name: str, size: str) -> Tensor:
    """1 * the flattened vector: a product of its own, as the vectors of several adapters would be multiplied."""
    flat = t.weight(f"{name}.ia3_l", (size,), dtype=method.adapter_dtype, trainable=True)
    return t.apply("scale", [flat], [(flat.dims, flat.dtype)])[0]

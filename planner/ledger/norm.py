"""Normalisation: what the hand-written and the native forms keep.

Letters: B batch, S sequence, H hidden.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Parameter, Tensor
from planner.model.shape import Norm

__all__ = ["normalise"]


def normalise(t: Operations, norm: Norm | None, name: str, x: Tensor) -> Tensor:
    """norm(x) as the profile's implementation computes it; x itself when there is no norm."""
    if norm is None:
        return x
    t.module = name
    if norm.kind == "layernorm" and norm.fp32 and not t.profile.fused_norm:
        return _layernorm_in_fp32(t, norm, name, x)
    if t.profile.fused_norm or norm.kind == "layernorm":
        return _native(t, norm, name, x)
    if (norm.kind == "rmsnorm" and t.profile.name == "litgpt") or norm.kind == "rmsnorm_1p":
        return _rmsnorm_in_fp32(t, norm, name, x)
    return _rmsnorm(t, norm, name, x)


def _native(t: Operations, norm: Norm, name: str, x: Tensor) -> Tensor:
    """One kernel: saves its input and fp32 statistics (mean and 1/std for layer norm, 1/rms alone for RMS norm)."""
    dim = x.dims[-1]
    weights = [t.weight(name + ".weight", (dim,))] if norm.affine else []
    if norm.bias:
        weights.append(t.weight(name + ".bias", (dim,)))
    library = norm.kind != "layernorm" and t.profile.in_place_gradients
    if t.compute is not None and not library:  # CUDA's autocast runs layer_norm in fp32 (autocast_mode.h, fp32 list)
        x = t.to(x, "fp32")
    statistics = [(x.dims[:-1], "fp32")] * (2 if norm.kind == "layernorm" else 1)
    alias = [library, *(False for _ in weights)]  # Liger's and unsloth's kernels write dx over dy
    return t.apply(norm.kind, [x, *weights], [(x.dims, x.dtype)], saves=[x], extra_saved=statistics, alias=alias)[0]


def _rmsnorm(t: Operations, norm: Norm, name: str, x: Tensor) -> Tensor:
    """weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype): the form of LlamaRMSNorm.

    Saved, per element of x:           bf16 input   fp32 input
        x32, for pow and for the product     4            4 (x itself)
        the normalised value, for the weight 2            4 (if the weight trains)
    and rsqrt's result, once per token.
    """
    dtype = x.dtype
    hidden = t.to(x, "fp32")
    scale = _inverse_rms(t, hidden)
    hidden = t.mul(hidden, scale)
    del scale
    if t.family in _WEIGHS_IN_FP32:
        weight: Parameter | Tensor = t.weight(name + ".weight", (x.dims[-1],))
        if t.family in _UPCASTS_WEIGHT and weight.dtype != "fp32":
            (weight,) = t.apply("to", [weight], [(weight.dims, "fp32")])
        return t.to(t.mul(weight, hidden), dtype)
    hidden = t.to(hidden, dtype)
    return t.mul(t.weight(name + ".weight", (x.dims[-1],)), hidden) if norm.affine else hidden


def _rmsnorm_in_fp32(t: Operations, norm: Norm, name: str, x: Tensor) -> Tensor:
    """(x32 * rsqrt(...) * (1 + weight32)).to(dtype): the form of Gemma, and of litgpt: the weight meets fp32."""
    hidden = t.to(x, "fp32")
    scale = _inverse_rms(t, hidden)
    hidden = t.mul(hidden, scale)
    del scale
    weight = t.weight(name + ".weight", (x.dims[-1],))
    (row,) = t.apply("to", [weight], [(weight.dims, "fp32")])
    if norm.kind == "rmsnorm_1p":
        row = t.scale(row, "add scalar")
    return t.to(t.mul(hidden, row), x.dtype)


def _layernorm_in_fp32(t: Operations, norm: Norm, name: str, x: Tensor) -> Tensor:
    """Layer norm of an upcast input: one kernel when there is no weight (OLMo), by hand when there is one (Cohere).

    By hand: d = x32 - mean, made twice; (d ** 2).mean; d * rsqrt(...); weight32 * that; back to x's format. Saved, in
    fp32 each: both d's and the normalised value, whatever the format of x.
    """
    dtype = x.dtype
    hidden = t.to(x, "fp32")
    if not norm.affine:
        return t.to(_native(t, norm, name, hidden), dtype)
    (mean,) = t.apply("mean", [hidden], [((*hidden.dims[:-1], "1"), "fp32")])
    scale = _inverse_rms(t, t.subtract(hidden, mean))
    hidden = t.mul(t.subtract(hidden, mean), scale)
    del mean, scale
    dims = hidden.dims[-2:] if norm_by_head(norm, hidden) else hidden.dims[-1:]
    weight = t.weight(name + ".weight", dims)
    (row,) = t.apply("to", [weight], [(weight.dims, "fp32")]) if weight.dtype != "fp32" else (weight,)
    return t.to(t.mul(row, hidden), dtype)


def norm_by_head(norm: Norm, x: Tensor) -> bool:
    """Whether the weights of a norm over (B, S, A, D) differ by head (Cohere): such input has four dims."""
    return norm.kind == "layernorm" and norm.affine and len(x.dims) == 4


def _inverse_rms(t: Operations, hidden: Tensor) -> Tensor:
    """rsqrt(mean(hidden ** 2) + eps): saves hidden and its own result."""
    square = t.map("pow", hidden)
    (mean,) = t.apply("mean", [square], [((*hidden.dims[:-1], "1"), "fp32")])
    del square
    return t.map("rsqrt", t.scale(mean, "add scalar"), saves="output")


_WEIGHS_IN_FP32 = frozenset(
    {"olmo2", "olmo3", "flex_olmo", "gpt_oss", "nemotron_h"}
)  # the weight meets the fp32 value, before the cast
_UPCASTS_WEIGHT = frozenset({"nemotron_h"})  # and is itself turned to fp32 first

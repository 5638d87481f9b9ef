"""The final norm, the output projection and the loss.

Letters: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Head

__all__ = ["cross_entropy", "loss_of", "project"]


def project(t: Operations, head: Head, x: Tensor) -> Tensor:
    """Logits, (B, S, V), of normalised hidden states."""
    vocabulary = t.dim("V", head.rows)
    if head.projection is not None:
        x = t.linear(head.projection_name, x, t.dim("P", head.projection))
    if not head.tied:
        return t.linear(head.name, x, vocabulary, bias=head.bias)
    t.module = head.name
    weight = t.weight(t.embedding_name, (vocabulary, x.dims[-1]))
    bias = t.weight(f"{head.name}.bias", (vocabulary,)) if head.bias else None
    return t.product(x, weight, (*x.dims[:-1], vocabulary), bias)


def loss_of(t: Operations, head: Head, x: Tensor, variant: str = "default") -> Tensor:
    """Cross-entropy of next-token prediction, in the profile's way or a fused one."""
    logits = project(t, head, x)
    t.module = "loss"
    if head.scaled:
        logits = t.scale(logits)
    if head.softcap:
        logits = t.scale(t.map("tanh", t.scale(logits, "div"), saves="output"))
    labels = _shifted_labels(t)
    return _LOSSES[t.profile.loss if variant == "default" else variant](t, logits, labels)


def _shifted_labels(t: Operations) -> Tensor:
    """Labels padded by one position, then cut and copied: int64, (B, S)."""
    padded = t.constant("pad", ("B", t.dim("S+1", t.sizes["S"] + 1)), "int64")
    labels = t.constant("shift", ("B", "S"), "int64")
    del padded
    return labels


def _float_then_flat(t: Operations, logits: Tensor, labels: Tensor) -> Tensor:
    """logits.float(), labels shifted instead of logits: transformers >= 4.50, loss/loss_utils.py ForCausalLMLoss."""
    return cross_entropy(t, t.to(logits, "fp32"), labels)


def _float_then_shift(t: Operations, logits: Tensor, labels: Tensor) -> Tensor:
    """logits.float(), then logits[..., :-1, :].contiguous(): transformers 4.4x."""
    upcast = t.to(logits, "fp32")
    t.dim("S-1", t.sizes["S"] - 1)
    (shifted,) = t.slices(upcast, [("B", "S-1", logits.dims[-1])])
    shifted = t.copy(shifted)
    return cross_entropy(t, shifted, labels)


def cross_entropy(t: Operations, logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax keeps its output; nll_loss writes a full-size gradient, log_softmax another."""
    return t.apply("nll_loss", [t.map("log_softmax", logits, saves="output")], [((), logits.dtype)], saves=[labels])[0]


_LOSSES = {"float_then_flat": _float_then_flat, "float_then_shift": _float_then_shift}

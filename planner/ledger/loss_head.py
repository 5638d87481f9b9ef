"""The final norm's output, the output projection and the loss.

Letters: B batch, S sequence, H hidden, V vocabulary.

What is live per logit at the highest points, in bytes, for bf16 logits (in fp32 where a copy is said to be):

    default of transformers 5      bf16 2, copy 4, log-softmax 4; backward: log-softmax 4, two gradients 4 + 4
    4.46 to 4.49                   the same and a shifted copy, 4
    fused (Liger's or unsloth's)   bf16 2, copy 4; the gradient is written over the copy
    liger                          none of it: a chunk of the logits at a time, gradients already in forward
    cce                            none of it: the log-sum-exp of each token
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.errors import NotCovered
from planner.ledger.fused_loss import (
    compiled_cross_entropy,
    cut_cross_entropy,
    fused_cross_entropy,
    fused_linear_cross_entropy,
)
from planner.ledger.operations import Operations
from planner.ledger.tape import Parameter, Tensor
from planner.model.shape import Head

__all__ = ["cross_entropy", "head_weight", "logits_of", "loss_of", "project"]

LITGPT_HEAD_CHUNK = 128  # litgpt/finetune/lora.py, lm_head_chunk_size; litgpt/utils.py, chunked_cross_entropy
TORCHTUNE_CHUNKS = 8  # torchtune/modules/loss/ce_chunked_output_loss.py, num_output_chunks

CrossEntropy = Callable[[Operations, Tensor, Tensor], Tensor]


def project(t: Operations, head: Head, x: Tensor) -> Tensor:
    """Logits, (B, S, V), of normalised hidden states."""
    vocabulary = t.dim("V", head.rows)
    if t.compute is None and not t.quantized(head.name):  # a stream kept in fp32 (Mamba) meets the weight's format
        x = t.to(x, head_weight(t, head, x).dtype)
    if head.projection is not None:
        x = t.linear(head.projection_name, x, t.dim("P", head.projection))
    if not head.tied:
        return t.linear(head.name, x, vocabulary, bias=head.bias)
    t.module = head.name
    bias = t.weight(f"{head.name}.bias", (vocabulary,)) if head.bias else None
    return t.product(x, head_weight(t, head, x), (*x.dims[:-1], vocabulary), bias)


def head_weight(t: Operations, head: Head, x: Tensor) -> Parameter:
    """The projection's matrix, (V, H): its own, or the embedding's."""
    name = t.embedding_name if head.tied else f"{head.name}.weight"
    return t.weight(name, (t.dim("V", head.rows), x.dims[-1]))


def logits_of(t: Operations, head: Head, x: Tensor) -> Tensor:
    """Logits as the model returns them: projected, scaled, soft-capped."""
    logits = project(t, head, x)
    t.module = "loss"
    if head.scaled:
        logits = t.scale(logits)
    if head.softcap:
        logits = t.scale(logits, "div")
        logits = t.map("tanh", logits, saves="output")
        logits = t.scale(logits)
    return logits


def loss_of(t: Operations, head: Head, x: Tensor, variant: str = "default") -> Tensor:
    """Cross-entropy of next-token prediction. variant: `default` is the profile's own way for the model's family;
    `fused` is the same with a fused cross-entropy kernel in it; liger, cce and chunked never hold all logits."""
    if variant == "liger" or (variant == "default" and t.profile.kernels == "liger"):  # monkey_patch.py's default
        return _liger(t, head, x)
    if variant == "cce":
        return _cut(t, head, x)
    if variant == "chunked":
        return _torchtune_chunks(t, head, x, cross_entropy)
    fused = variant == "fused" or t.profile.fused_loss
    name = t.profile.loss_for(t.family)
    if t.method.name == "full" and t.profile.full_loss is not None:
        name = t.profile.full_loss
    return _LOSSES[name](t, head, x, fused_cross_entropy if fused else cross_entropy)


def _labels(t: Operations) -> Tensor:
    """Labels padded by one position, then cut and copied: int64, (B, S)."""
    padded = t.constant("pad", ("B", t.dim("S+1", t.sizes["S"] + 1)), "int64")
    labels = t.constant("shift", ("B", "S"), "int64")
    del padded
    return labels


def _without_last(t: Operations, x: Tensor) -> Tensor:
    """x[..., :-1, :].contiguous()."""
    t.dim("S-1", t.sizes["S"] - 1)
    (shifted,) = t.slices(x, [("B", "S-1", x.dims[-1])])
    return t.copy(shifted)


def _float_then_flat(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """logits.float(), labels shifted instead of logits: transformers >= 4.50, loss/loss_utils.py ForCausalLMLoss."""
    logits = logits_of(t, head, x)
    labels = _labels(t)
    return loss(t, t.to(logits, "fp32"), labels)


def _float_then_shift(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """logits.float(), then shifted and copied, while the caller holds the logits: transformers 4.46 to 4.49."""
    logits = logits_of(t, head, x)
    labels = _labels(t)
    upcast = t.to(logits, "fp32")
    shifted = _without_last(t, upcast)
    return loss(t, shifted, labels)


def _float_at_once(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """lm_head(x).float(), then shifted and copied: transformers 4.45, modeling_llama.py; GPT-J throughout 4.x."""
    upcast = t.to(logits_of(t, head, x), "fp32")
    shifted = _without_last(t, upcast)
    return loss(t, shifted, _labels(t))


def _flat_at_once(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """output(h).float() and a loss over labels shifted beforehand: torchtune without chunks."""
    upcast = t.to(logits_of(t, head, x), "fp32")
    return loss(t, upcast, t.constant("labels", ("B", "S"), "int64"))


def _plain(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """A loss in the logits' own format, over labels shifted beforehand."""
    return loss(t, logits_of(t, head, x), t.constant("labels", ("B", "S"), "int64"))


def _shift(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """Shifted, copied, and no other format: GPT-2 and its kin in transformers 4.x."""
    logits = logits_of(t, head, x)
    shifted = _without_last(t, logits)
    return loss(t, shifted, _labels(t))


def cross_entropy(t: Operations, logits: Tensor, labels: Tensor | None) -> Tensor:
    """log_softmax keeps its output; nll_loss writes a full-size gradient, log_softmax another."""
    return t.apply("nll_loss", [t.map("log_softmax", logits, saves="output")], [((), logits.dtype)], saves=[labels])[0]


# ---- losses that never hold all logits, or hold them in pieces -----------------------------------------------------


def _liger(t: Operations, head: Head, x: Tensor) -> Tensor:
    """Liger's projection and loss in one: transformers/model/llama.py lce_forward."""
    if head.bias or head.softcap or head.projection is not None:
        raise NotCovered("loss liger is not covered for a head with a bias, a soft cap or a projection.")
    t.module = "loss"
    old = t.profile.fused_linear_loss == "liger-0.4"
    hidden = _without_last(t, x) if old else x
    return fused_linear_cross_entropy(t, hidden, head_weight(t, head, x), old=old)


def _cut(t: Operations, head: Head, x: Tensor) -> Tensor:
    t.module = "loss"
    return cut_cross_entropy(t, x, head_weight(t, head, x))


def _torchtune_chunks(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """The projection of eight chunks of positions, then for each its fp32 copy and loss.

    torchtune/modules/transformer.py chunked_output; modules/loss/ce_chunked_output_loss.py, whose compiled form (its
    apply_compile_strategy) takes the chunk as it is.
    """
    size = -(-t.sizes["S"] // TORCHTUNE_CHUNKS)
    chunks = [logits_of(t, head, part) for part in _chunks(t, x, size, TORCHTUNE_CHUNKS)]
    labels = t.constant("labels", ("B", "S"), "int64")
    total = None
    for chunk in chunks:
        part = compiled_cross_entropy(t, chunk, labels) if t.compiled else loss(t, t.to(chunk, "fp32"), labels)
        total = part if total is None else t.add(total, part)
        del part
    assert total is not None
    return total


def _litgpt_chunks(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """The projection of 128 positions at a time; Lightning Fabric turns the list to fp32; a loss for each chunk.

    The training loop's variable `logits` keeps the fp32 chunks until the model's next forward pass has returned
    (lightning/fabric/wrappers.py _FabricModule.forward; litgpt/finetune/lora.py fit).
    """
    count = int(np.max(-(-np.asarray(t.sizes["S"]) // LITGPT_HEAD_CHUNK)))
    t.module = "loss"
    previous = t.allocate("previous logits", ("B", "S", t.dim("V", head.rows)), "fp32") if t.follows_equal else None
    narrow = [logits_of(t, head, part) for part in _chunks(t, x, LITGPT_HEAD_CHUNK, count)]
    chunks = [t.to(chunk, "fp32") for chunk in narrow]
    del narrow, previous
    t.hold(*chunks)
    labels = t.constant("labels", ("B", "S"), "int64")
    parts = [t.view(chunk, chunk.dims) for chunk in chunks[:-1]]
    shorter = t.dim("last", np.maximum(t.sizes[chunks[-1].dims[1]] - 1, 0))
    (last,) = t.slices(chunks[-1], [("B", shorter, chunks[-1].dims[-1])])
    parts.append(t.copy(last))
    del last
    losses = [loss(t, part, labels) for part in parts]
    return t.cat(losses, ())


def _litgpt_flat(t: Operations, head: Head, x: Tensor, loss: CrossEntropy) -> Tensor:
    """All logits, turned to fp32 by Fabric, cut by one position, and a loss for each 128 of them: finetune/full.py."""
    t.module = "loss"
    previous = t.allocate("previous logits", ("B", "S", t.dim("V", head.rows)), "fp32") if t.follows_equal else None
    logits = t.to(logits_of(t, head, x), "fp32")
    del previous
    t.hold(logits)
    t.dim("S-1", t.sizes["S"] - 1)
    (cut,) = t.slices(logits, [("B", "S-1", logits.dims[-1])])
    return loss(t, t.copy(cut), _labels(t))


def _chunks(t: Operations, x: Tensor, size: int, count: int) -> list[Tensor]:
    """x cut along its positions into `count` views of `size`, the last ones shorter or empty."""
    lengths = [np.clip(np.asarray(t.sizes["S"]) - size * index, 0, size) for index in range(count)]
    return t.split(x, [("B", t.dim("chunk", length), x.dims[-1]) for length in lengths])


_LOSSES = {
    "float_then_flat": _float_then_flat,
    "float_then_shift": _float_then_shift,
    "float_at_once": _float_at_once,
    "shift": _shift,
    "plain": _plain,
    "flat_at_once": _flat_at_once,
    "torchtune_chunks": _torchtune_chunks,
    "litgpt_chunks": _litgpt_chunks,
    "litgpt_flat": _litgpt_flat,
}

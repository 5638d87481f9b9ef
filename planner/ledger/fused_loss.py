"""Losses that fuse cross-entropy with its gradient, or with the projection before it.

Letters: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from planner.ledger.operations import Operations
from planner.ledger.tape import Parameter, Storage, Tensor

__all__ = ["compiled_cross_entropy", "cut_cross_entropy", "fused_cross_entropy", "fused_linear_cross_entropy"]


def fused_cross_entropy(t: Operations, logits: Tensor, labels: Tensor) -> Tensor:
    """One kernel that writes the gradient over the logits; saves a loss and a log-sum-exp for each token.

    Liger-Kernel ops/cross_entropy.py (in forward); unsloth's and fms-acceleration's kernels/unsloth/
    cross_entropy_loss.py, Fast_CrossEntropyLoss (in backward).
    """
    tokens = logits.dims[:-1]
    return t.apply(
        "fused cross entropy",
        [logits],
        [((), "fp32")],
        saves=[logits, labels],
        extra_saved=[(tokens, "fp32")],
        scratch=[(tokens, "fp32")],
        gradients_in=[logits.storage],
    )[0]


def compiled_cross_entropy(t: Operations, logits: Tensor, labels: Tensor) -> Tensor:
    """torch.compile's kernels: upcast, maximum and sum in one pass over the logits, which are kept as they are.

    Apple's CCE paper, Table 1, row `torch.compile`, 8192 tokens x 256000 (arXiv:2411.09009), in MiB: loss alone 4000,
    the 16-bit logits; gradient 12000, an fp32 tensor beside the 16-bit gradient; both 16000.
    """
    tokens = logits.dims[:-1]
    return t.apply(
        "compiled cross entropy",
        [logits],
        [((), "fp32")],
        saves=[logits, labels],
        extra_saved=[(tokens, "fp32")],
        backward_scratch=[(logits.dims, "fp32")],
    )[0]


def fused_linear_cross_entropy(t: Operations, x: Tensor, weight: Parameter, *, old: bool) -> Tensor:
    """Projection, loss and all gradients in forward, for a chunk of tokens at a time; saves the gradients.

    Liger-Kernel ops/fused_linear_cross_entropy.py. V / H chunks, so that a chunk of logits is about as large as x;
    its number of tokens is rounded up to a power of two. Python's variables keep a chunk's tensors until the next
    chunk overwrites them, so two chunks are run here: the second starts from what the first has left.

        old (0.4)    logits, their fp32 copy, the gradient in the logits' format, that times a factor
        0.6          logits alone, overwritten by their gradient; the weight's gradient through an fp32 copy
    """
    batch, sequence, hidden = x.dims
    tokens = np.asarray(t.sizes[batch]) * np.asarray(t.sizes[sequence])
    parts = -(-t.sizes[weight.dims[0]] // t.sizes[hidden])
    size = np.minimum(2 ** np.ceil(np.log2(-(-tokens // parts))).astype(np.int64), tokens)
    compute = t.compute or x.dtype
    grad_weight: Storage | None = None
    if weight.trainable:
        grad_weight = t.allocate("grad weight", weight.dims, weight.dtype, "gradient")
    grad_input = t.allocate("grad input", x.dims, x.dtype)
    losses = t.allocate("losses", (batch, sequence), "fp32")
    logits = scaled = None
    for count in (size, np.minimum(size, tokens - size)):
        rows = (t.dim("tokens", count), weight.dims[0])
        narrow = t.allocate("logits", rows, compute)
        if old:
            logits = narrow
            del narrow
            logits = t.allocate("logits in fp32", rows, "fp32")
            logits = t.allocate("gradient of logits", rows, compute)
            scaled = t.allocate("scaled gradient", rows, compute)
        else:
            logits = scaled = narrow
            del narrow
        product = t.allocate("product", (rows[0], hidden), compute)
        del product
        if grad_weight is not None and not old:
            product = t.allocate("product", weight.dims, compute)
            wide = t.allocate("product in fp32", weight.dims, "fp32")
            del product, wide
    del logits, scaled, losses
    return t.apply("fused linear cross entropy", [x, weight], [((), "fp32")], gradients_in=[grad_input, grad_weight])[0]


def cut_cross_entropy(t: Operations, x: Tensor, weight: Parameter) -> Tensor:
    """Apple's kernel: no logits at all. Saves the log-sum-exp of each token and the mean logit of each word.

    apple/ml-cross-entropy cut_cross_entropy/cce.py: backward sorts the vocabulary by that mean, int32, and
    accumulates both gradients in the inputs' own format.
    """
    tokens, vocabulary = x.dims[:-1], weight.dims[:1]
    return t.apply(
        "cut cross entropy",
        [x, weight],
        [((), "fp32")],
        saves=[x],
        extra_saved=[(tokens, "fp32"), (vocabulary, "fp32")],
        scratch=[(tokens, "fp32")],
        backward_scratch=[(vocabulary, "int32")],
    )[0]

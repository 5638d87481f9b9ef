"""torchtune's transformer block, in the shape of its own modules.

torchtune at 1814feb1 (2024-11-18), modules/transformer.py (TransformerSelfAttentionLayer), attention.py,
position_embeddings.py, feed_forward.py. What differs from transformers: rotation in fp32 on pairs of neighbours, with
a table row gathered for each token of a packed batch; k and v repeated for grouped heads before the kernel.

Letters: B batch, S sequence, H hidden, A query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import NotCovered
from planner.ledger.attention_kernels import attend_fused
from planner.ledger.mlp import feed_forward
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, Mlp

__all__ = ["run_block"]


def run_block(t: Operations, block: Block, x: Tensor) -> Tensor:
    """The block's output for input x, (B, S, H). Raises NotCovered for what is not a Llama-like block."""
    spec, mlp = block.mixer, block.ffn
    if not isinstance(spec, Attention) or not isinstance(mlp, Mlp) or block.residual != "sequential":
        raise NotCovered("torchtune's ledger covers sequential blocks of dense attention and feed-forward layers only.")
    if spec.qk_norm is not None or spec.softcap or spec.rotary_dim != spec.head_dim or len(spec.names) != 3:
        raise NotCovered("torchtune's ledger covers attention like Llama's only.")
    h = normalise(t, block.norm, block.norm_names[0], x)
    attended = _attend(t, spec, h)
    h = t.add(attended, x)
    fed = feed_forward(t, mlp, normalise(t, block.norm, block.norm_names[1], h), x.dims[-1])
    return t.add(h, fed)


def _attend(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    batch, sequence, hidden = x.dims
    heads, groups, size = t.dim("A", spec.heads), t.dim("K", spec.kv_heads), t.dim("D", spec.head_dim)
    name_q, name_k, name_v = spec.names
    wide, narrow = t.dim("AD", spec.heads * spec.head_dim), t.dim("KD", spec.kv_heads * spec.head_dim)
    q = t.view(t.linear(name_q, x, wide, bias=spec.q_bias), (batch, heads, sequence, size))
    q = _rotate(t, spec, q)
    k = t.view(t.linear(name_k, x, narrow, bias=spec.k_bias), (batch, groups, sequence, size))
    v = t.view(t.linear(name_v, x, narrow, bias=spec.v_bias), (batch, groups, sequence, size))
    k = _rotate(t, spec, k)
    if spec.kv_heads != spec.heads:
        k, v = (t.copy(tensor, (batch, heads, sequence, size), "repeat_kv") for tensor in (k, v))
    output = attend_fused(t, replace(spec, kv_heads=spec.heads), q, k, v)
    return t.linear(spec.out_name, output, hidden, bias=spec.out_bias)


def _rotate(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    """RotaryPositionalEmbeddings.forward: x.float() in pairs, times the table's rows for these positions."""
    t.module = "rotary"
    rows = t.constant("rope_cache", (x.dims[0], x.dims[2], x.dims[3]), "fp32")
    pairs = t.to(x, "fp32")
    half = (*x.dims[:-1], t.dim("R/2", spec.head_dim // 2))
    even, odd = t.slices(pairs, [half, half])
    first = t.add(t.mul(even, rows, half), t.scale(t.mul(odd, rows, half), "neg"))
    second = t.add(t.mul(odd, rows, half), t.mul(even, rows, half))
    turned = t.cat([first, second], x.dims, "stack")
    return t.to(turned, x.dtype)

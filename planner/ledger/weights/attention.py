"""Weights of attention layers: softmax attention of every grouping, and multi-head latent attention.

Letters: H hidden, A query heads, K key/value heads, D head size, E value head size.
"""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Attention, LatentAttention, Norm, Weight

__all__ = ["attention_weights", "latent_attention_weights"]


def attention_weights(attention: Attention, hidden: int) -> tuple[Weight, ...]:
    """Projections (A D + K D + K E rows in all, twice A D with an output gate), their biases, norms and sinks.

    With one name the projections are one fused matrix, with two a query and a fused key-value matrix.
    A layer that shares the keys and values of an earlier one owns the query and output projections only.
    """
    a = attention
    value_dim = a.value_dim or a.head_dim
    kv_input = a.kv_input or hidden
    q_out = a.heads * a.head_dim * (2 if a.gate else 1)
    k_out, v_out = a.kv_heads * a.head_dim, a.kv_heads * value_dim
    weights: tuple[Weight, ...] = ()
    if a.shares_kv:
        weights += linear_weights(a.names[0], q_out, hidden, bias=a.q_bias, component="attention")
    elif len(a.names) == 1:
        weights += linear_weights(a.names[0], q_out + k_out + v_out, hidden, bias=a.q_bias, component="attention")
    elif len(a.names) == 2:
        weights += linear_weights(a.names[0], q_out, hidden, bias=a.q_bias, component="attention")
        weights += linear_weights(a.names[1], k_out + v_out, kv_input, bias=a.k_bias, component="attention")
    else:
        weights += linear_weights(a.names[0], q_out, hidden, bias=a.q_bias, component="attention")
        weights += linear_weights(a.names[1], k_out, kv_input, bias=a.k_bias, component="attention")
        if not a.value_from_key:
            weights += linear_weights(a.names[2], v_out, kv_input, bias=a.v_bias, component="attention")
    if a.out_name:
        weights += linear_weights(
            a.out_name, a.out_size or hidden, a.heads * value_dim, bias=a.out_bias, component="attention"
        )
    if a.qk_norm is not None:
        q_shape: tuple[int, ...] = (a.head_dim,)
        k_shape: tuple[int, ...] = (a.head_dim,)
        if a.qk_norm_over == "width":
            q_shape, k_shape = (a.heads * a.head_dim,), (a.kv_heads * a.head_dim,)
        elif a.qk_norm_over == "heads":
            q_shape, k_shape = (a.heads, a.head_dim), (a.kv_heads, a.head_dim)
        weights += norm_weights(a.qk_norm, a.qk_norm_names[0], q_shape)
        if not a.shares_kv:
            weights += norm_weights(a.qk_norm, a.qk_norm_names[1], k_shape)
    module = a.names[0].rpartition(".")[0]
    if a.sinks:
        weights += (Weight(name=f"{module}.{a.sinks_name}", shape=(a.heads,), component="attention", kind="other"),)
    if a.relative_buckets:
        name = f"{module}.relative_attention_bias.weight"
        shape = (a.relative_buckets, a.heads)
        weights += (Weight(name=name, shape=shape, component="attention", kind="embedding"),)
    return weights


def latent_attention_weights(attention: LatentAttention, hidden: int) -> tuple[Weight, ...]:
    """The low-rank query and key-value projections with their norms, the output, and the sparse indexer.

    DeepSeek-V2 (arXiv:2405.04434) equations 9-17; DeepSeek-V3.2 for the indexer.
    """
    a = attention
    qk_dim = a.nope_dim + a.rope_dim
    weights: tuple[Weight, ...] = ()
    if a.q_rank is None:
        weights += linear_weights("self_attn.q_proj", a.heads * qk_dim, hidden, bias=False, component="attention")
    else:
        weights += linear_weights("self_attn.q_a_proj", a.q_rank, hidden, bias=a.bias, component="attention")
        weights += norm_weights(a.norm, "self_attn.q_a_layernorm", a.q_rank)
        weights += linear_weights("self_attn.q_b_proj", a.heads * qk_dim, a.q_rank, bias=False, component="attention")
    latent = a.kv_rank + a.rope_dim
    kv_out = a.heads * (a.nope_dim + a.value_dim)
    weights += linear_weights("self_attn.kv_a_proj_with_mqa", latent, hidden, bias=a.bias, component="attention")
    weights += norm_weights(a.norm, "self_attn.kv_a_layernorm", a.kv_rank)
    weights += linear_weights("self_attn.kv_b_proj", kv_out, a.kv_rank, bias=False, component="attention")
    weights += linear_weights("self_attn.o_proj", hidden, a.heads * a.value_dim, bias=a.bias, component="attention")
    if a.index_heads:
        width = a.index_heads * a.index_dim
        name = "self_attn.indexer"
        weights += linear_weights(f"{name}.wq_b", width, a.q_rank or hidden, bias=False, component="attention")
        weights += linear_weights(f"{name}.wk", a.index_dim, hidden, bias=False, component="attention")
        weights += norm_weights(Norm(kind="layernorm", bias=True, fp32=False), f"{name}.k_norm", a.index_dim)
        weights += linear_weights(f"{name}.weights_proj", a.index_heads, hidden, bias=False, component="attention")
    return weights

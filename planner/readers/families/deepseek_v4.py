"""DeepSeek V4: one shared key-value head, compressed long-range attention, several residual streams.

Its weights are described exactly. What its forward pass keeps and caches is not: the shape says so.

Letters: H hidden, A heads, D head size, M residual streams, C tokens merged into one compressed entry.
"""

from __future__ import annotations

from typing import Final

from planner.model.shape import Block, Component, Head, ModelShape, Moe, Weight, WeightKind
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import RMS_NORM, assemble, blocks_by_kind, read_trunk
from planner.readers.families.moe import check_routing, shared_experts

__all__ = ["READERS"]

_SLIDING: Final = "sliding_attention"
_SPARSE: Final = "compressed_sparse_attention"
_HEAVY: Final = "heavily_compressed_attention"
_KIND_OF_RATIO: Final = {0: _SLIDING, 4: _SPARSE, 128: _HEAVY}
_UNCOVERED: Final = "compressed attention and residual streams (weights counted; activations and caches not described)"


def _weight(name: str, *shape: int, kind: WeightKind = "linear", component: Component = "attention") -> Weight:
    return Weight(name=name, shape=shape, component=component, kind=kind)


def _attention(view: ConfigView, hidden: int) -> tuple[Weight, ...]:
    """The part that every layer has: low-rank queries, one key-value head, a grouped low-rank output."""
    heads, head_dim = view.int("num_attention_heads", 64), view.int("head_dim", 512)
    q_rank, o_rank, groups = view.int("q_lora_rank", 1024), view.int("o_lora_rank", 1024), view.int("o_groups", 8)
    if view.bool("attention_bias", False):
        raise view.fail("attention_bias", "false, the only form described here")
    return (
        _weight("self_attn.sinks", heads, kind="other"),
        _weight("self_attn.q_a_proj.weight", q_rank, hidden),
        _weight("self_attn.q_a_norm.weight", q_rank, kind="norm", component="norm"),
        _weight("self_attn.q_b_proj.weight", heads * head_dim, q_rank),
        _weight("self_attn.kv_proj.weight", head_dim, hidden),
        _weight("self_attn.kv_norm.weight", head_dim, kind="norm", component="norm"),
        _weight("self_attn.o_a_proj.weight", groups * o_rank, heads * head_dim // groups),
        _weight("self_attn.o_b_proj.weight", hidden, groups * o_rank),
    )


def _compressor(view: ConfigView, hidden: int, kind: str) -> tuple[Weight, ...]:
    """What merges C tokens into one entry: 128 without overlap, or 4 with overlap and an indexer over the entries."""
    if kind == _SLIDING:
        return ()
    rates = view.sub("compress_rates")
    size = view.int("head_dim", 512)
    wide = size if kind == _HEAVY else 2 * size  # overlapping windows keep two halves
    rate = rates.int(kind, 128 if kind == _HEAVY else 4)
    name = "self_attn.compressor"
    merging = (
        _weight(f"{name}.position_bias", rate, wide, kind="other"),
        _weight(f"{name}.kv_proj.weight", wide, hidden),
        _weight(f"{name}.gate_proj.weight", wide, hidden),
        _weight(f"{name}.kv_norm.weight", size, kind="norm", component="norm"),
    )
    if kind == _HEAVY:
        return merging
    heads, index_dim = view.int("index_n_heads", 64), view.int("index_head_dim", 128)
    name = f"{name}.indexer"
    return (
        *merging,
        _weight(f"{name}.position_bias", rate, 2 * index_dim, kind="other"),
        _weight(f"{name}.kv_proj.weight", 2 * index_dim, hidden),
        _weight(f"{name}.gate_proj.weight", 2 * index_dim, hidden),
        _weight(f"{name}.kv_norm.weight", index_dim, kind="norm", component="norm"),
        _weight(f"{name}.q_b_proj.weight", heads * index_dim, view.int("q_lora_rank", 1024)),
        _weight(f"{name}.scorer.weights_proj.weight", heads, hidden),
    )


def _streams(name: str, streams: int, hidden: int) -> tuple[Weight, ...]:
    """The mixing of M residual streams around one branch: M in, M out and M x M coefficients."""
    mixed = 2 * streams + streams * streams
    return (
        _weight(f"{name}.fn", mixed, streams * hidden, kind="other", component="other"),
        _weight(f"{name}.base", mixed, kind="other", component="other"),
        _weight(f"{name}.scale", 3, kind="other", component="other"),
    )


def _layer_kinds(view: ConfigView, layers: int) -> list[str]:
    """`layer_types`, or the ratios of `compress_ratios`, or two heavy layers and then heavy and sparse in turn."""
    stated = view.strings("layer_types", length=layers, among=(_SLIDING, _SPARSE, _HEAVY))
    ratios = view.ints("compress_ratios")
    if stated is not None:
        return stated
    if ratios is None:
        return [_SPARSE if layer >= 2 and layer % 2 else _HEAVY for layer in range(layers)]
    if len(ratios) < layers or not set(ratios) <= set(_KIND_OF_RATIO):
        raise view.fail("compress_ratios", f"at least {layers} values out of 0, 4 and 128")
    return [_KIND_OF_RATIO[ratio] for ratio in ratios[:layers]]


def _deepseek_v4(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=129_280, positions=1_048_576, tied=False)
    view.ignore("num_key_value_heads", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "compress_rope_theta")
    view.ignore(
        "hc_sinkhorn_iters", "hc_eps", "swiglu_limit", "sliding_window", "index_topk", "num_nextn_predict_layers"
    )
    view.ignore("router_jitter_noise", "partial_rotary_factor", "mlp_bias", "attention_dropout", "qk_rope_head_dim")
    view.ignore("expert_dtype", "topk_method", "num_hash_layers", "mlp_layer_types", "intermediate_size")
    view.ignore("compress_rate_csa", "compress_rate_hca", "n_group", "topk_group")
    streams = view.int("hc_mult", 4)
    activation = view.str("hidden_act", "silu")
    width = view.int("moe_intermediate_size", 2048)
    moe = Moe(
        experts=view.int("n_routed_experts", 256, also=("num_local_experts",)),
        top_k=view.int("num_experts_per_tok", 6),
        width=width,
        activation=activation,
        shared=shared_experts(view.int("n_shared_experts", 1, minimum=0), width, activation),
    )
    check_routing(view, moe)
    common = _attention(view, trunk.hidden)
    mixing = _streams("attn_hc", streams, trunk.hidden) + _streams("ffn_hc", streams, trunk.hidden)
    blocks = blocks_by_kind(
        _layer_kinds(view, trunk.layers),
        lambda kind: Block(
            mixer=None, ffn=moe, norm=RMS_NORM, extra=common + _compressor(view, trunk.hidden, kind) + mixing
        ),
    )
    joined = (
        _weight("model.hc_head.hc_fn", streams, streams * trunk.hidden, kind="other", component="other"),
        _weight("model.hc_head.hc_base", streams, kind="other", component="other"),
        _weight("model.hc_head.hc_scale", 1, kind="other", component="other"),
    )
    head = Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, extra=joined)
    return assemble(view, trunk, blocks, norm=RMS_NORM, head=head, uncovered=(_UNCOVERED,))


READERS = {"deepseek_v4": _deepseek_v4}

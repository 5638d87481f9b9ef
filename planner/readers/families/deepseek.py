"""DeepSeek and those that took over its parts: latent attention, many narrow experts beside shared ones.

Prediction heads for further tokens (MTP) are no part of the model here; published totals leave them out as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.model.shape import Block, LatentAttention, Mlp, ModelShape, Moe
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    RMS_NORM,
    Trunk,
    assemble,
    blocks_by_kind,
    gated_mlp,
    grouped_attention,
    read_trunk,
)
from planner.readers.families.moe import check_routing, shared_experts

__all__ = ["READERS"]


def _latent_attention(
    view: ConfigView, *, heads: int, q_rank: int | None, kv_rank: int, nope: int, rope: int, value: int
) -> LatentAttention:
    """Multi-head latent attention; the keyword values are the defaults of the reference class."""
    view.ignore("num_key_value_heads", "head_dim", "qk_head_dim", "rope_interleave", "partial_rotary_factor")
    return LatentAttention(
        heads=view.int("num_attention_heads", heads),
        q_rank=view.maybe_int("q_lora_rank", q_rank),
        kv_rank=view.int("kv_lora_rank", kv_rank),
        nope_dim=view.int("qk_nope_head_dim", nope),
        rope_dim=view.int("qk_rope_head_dim", rope),
        value_dim=view.int("v_head_dim", value),
        bias=view.bool("attention_bias", False),
    )


def _router(view: ConfigView) -> dict[str, Any]:
    """What the router's arithmetic depends on: V2 takes softmax scores, V3 and what follows it sigmoids."""
    view.ignore("topk_group")
    if view.owner == "deepseek_v2":
        limited = view.str("topk_method", "greedy") == "group_limited_greedy"
        view.ignore("norm_topk_prob", "n_group")
        return {"routing": "deepseek_v2", "groups": 2 if limited else 1}
    view.ignore("topk_method", "n_group")
    if view.owner == "deepseek":
        view.ignore("norm_topk_prob")
        return {}
    return {"routing": "deepseek_v3", "normalises_weights": view.bool("norm_topk_prob", True)}


def _experts(view: ConfigView, *, experts: int, top_k: int, width: int, shared: int, activation: str) -> Moe:
    """Routed and shared experts. The correction bias of the router is a buffer, not a parameter."""
    view.ignore("routed_scaling_factor", "scoring_func")
    view.ignore("seq_aux", "aux_loss_alpha", "ep_size", "num_nextn_predict_layers", "num_mtp_layers")
    wide = view.int("moe_intermediate_size", width)
    moe = Moe(
        experts=view.int("n_routed_experts", experts, also=("num_experts", "num_local_experts")),
        top_k=view.int("num_experts_per_tok", top_k),
        width=wide,
        activation=activation,
        shared=shared_experts(view.int("n_shared_experts", shared, minimum=0), wide, activation),
        **_router(view),
    )
    return check_routing(view, moe)


def _sigmoid_scored(view: ConfigView, moe: Moe, groups: int) -> Moe:
    """DeepSeek-V3's router: sigmoid scores, the best groups first; `groups` is the default of the reference class."""
    return replace(
        moe,
        routing="deepseek_v3",
        normalises_weights=view.bool("norm_topk_prob", True),
        groups=view.maybe_int("n_group", groups) or 1,
    )


def _sparse_from(view: ConfigView, layers: int, first: int) -> list[bool]:
    """Which layers are routed: `mlp_layer_types`, or all from `first_k_dense_replace` on."""
    stated = view.strings("mlp_layer_types", length=layers, among=("dense", "sparse"))
    dense = view.int("first_k_dense_replace", first, minimum=0)
    view.ignore("moe_layer_freq")
    if stated is not None:
        return [kind == "sparse" for kind in stated]
    step = view.int("moe_layer_freq", 1) if view.has("moe_layer_freq") else 1
    return [layer >= dense and layer % step == 0 for layer in range(layers)]


def _whole(view: ConfigView, trunk: Trunk, mixer: LatentAttention, dense: Mlp, moe: Moe, first: int) -> ModelShape:
    view.ignore("attention_dropout")
    blocks = blocks_by_kind(
        _sparse_from(view, trunk.layers, first),
        lambda routed: Block(mixer=mixer, ffn=moe if routed else dense, norm=RMS_NORM),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _deepseek(view: ConfigView) -> ModelShape:
    """DeepSeekMoE 16B (arXiv:2401.06066): ordinary attention. Code in its repository; experts are separate layers."""
    trunk = read_trunk(view, vocab=102_400, positions=2048, tied=False)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=32, qkv_bias=bias, out_bias=bias)
    dense = gated_mlp(view, 11_008)
    moe = replace(
        _experts(view, experts=64, top_k=6, width=1407, shared=2, activation=dense.activation),
        stacked=False,
        expert_names=("gate_proj", "up_proj", "down_proj"),
    )
    blocks = blocks_by_kind(
        _sparse_from(view, trunk.layers, 0),
        lambda routed: Block(mixer=attention, ffn=moe if routed else dense, norm=RMS_NORM),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _deepseek_v2(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=102_400, positions=2048, tied=False)
    mixer = _latent_attention(view, heads=32, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)
    dense = gated_mlp(view, 11_008, bias=view.bool("mlp_bias", False))
    moe = _experts(view, experts=64, top_k=6, width=1407, shared=2, activation=dense.activation)
    limited = view.str("topk_method", "greedy") == "group_limited_greedy"
    moe = replace(moe, routing="deepseek_v2", groups=view.int("n_group", 1) if limited else 1)
    return _whole(view, trunk, mixer, dense, moe, 0)


def _deepseek_v3(view: ConfigView) -> ModelShape:
    """Also Kimi K2, whose config names a type of its own and the same class."""
    trunk = read_trunk(view, vocab=129_280, positions=4096, tied=False)
    mixer = _latent_attention(view, heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)
    dense = gated_mlp(view, 18_432)
    moe = _experts(view, experts=256, top_k=8, width=2048, shared=1, activation=dense.activation)
    return _whole(view, trunk, mixer, dense, _sigmoid_scored(view, moe, 8), 3)


def _mistral4(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, hidden=4096, layers=36, vocab=131_072, positions=1_048_576, tied=False)
    mixer = _latent_attention(view, heads=32, q_rank=1024, kv_rank=256, nope=64, rope=64, value=128)
    dense = gated_mlp(view, 12_288)
    moe = _experts(view, experts=128, top_k=4, width=2048, shared=1, activation=dense.activation)
    return _whole(view, trunk, mixer, dense, moe, 0)


def _indexed(view: ConfigView, mixer: LatentAttention, heads: int) -> LatentAttention:
    """The same attention with the sparse indexer, `heads` being the default of the reference class."""
    view.ignore("indexer_rope_interleave", "layer_types")
    return replace(
        mixer,
        index_heads=view.int("index_n_heads", heads),
        index_dim=view.int("index_head_dim", 128),
        index_top_k=view.int("index_topk", 2048),
    )


def _deepseek_v32(view: ConfigView) -> ModelShape:
    """Every layer picks the keys it attends to with an indexer."""
    trunk = read_trunk(view, vocab=129_280, positions=163_840, tied=False)
    mixer = _latent_attention(view, heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)
    view.ignore("mlp_bias")
    dense = gated_mlp(view, 18_432)
    moe = _experts(view, experts=256, top_k=8, width=2048, shared=1, activation=dense.activation)
    return _whole(view, trunk, _indexed(view, mixer, 64), dense, _sigmoid_scored(view, moe, 8), 3)


def _indexer_kinds(view: ConfigView, layers: int) -> list[str]:
    """Which layers run an indexer of their own: `indexer_types`, a pattern such as "FSSF", or every n-th one."""
    stated = view.strings("indexer_types", length=layers, among=("full", "shared"))
    if stated is not None:
        view.ignore("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
        return stated
    if view.has("index_topk_pattern"):
        pattern = view.str("index_topk_pattern")
        if len(pattern) != layers or not set(pattern) <= {"F", "S"}:
            raise view.fail("index_topk_pattern", f"{layers} letters F or S")
        return ["full" if letter == "F" else "shared" for letter in pattern]
    every = view.int("index_topk_freq", 1) if view.has("index_topk_freq") else 1
    offset = view.int("index_skip_topk_offset", 2, minimum=0) if view.has("index_skip_topk_offset") else 2
    return ["full" if max(layer - offset + 1, 0) % every == 0 else "shared" for layer in range(layers)]


def _glm_moe_dsa(view: ConfigView) -> ModelShape:
    """GLM-5: DeepSeek V3.2's layer; some layers reuse what the indexer of an earlier one picked."""
    trunk = read_trunk(view, vocab=154_880, positions=202_752, tied=False)
    plain = _latent_attention(view, heads=64, q_rank=2048, kv_rank=512, nope=192, rope=64, value=256)
    indexed = _indexed(view, plain, 32)
    view.ignore("mlp_bias", "attention_dropout", "index_share_for_mtp_iteration")
    dense = gated_mlp(view, 12_288)
    moe = _experts(view, experts=256, top_k=8, width=2048, shared=1, activation=dense.activation)
    moe = _sigmoid_scored(view, moe, 1)
    kinds = list(zip(_sparse_from(view, trunk.layers, 3), _indexer_kinds(view, trunk.layers), strict=True))
    blocks = blocks_by_kind(
        kinds,
        lambda kind: Block(mixer=indexed if kind[1] == "full" else plain, ffn=moe if kind[0] else dense, norm=RMS_NORM),
    )
    shared = any(kind == "shared" for _, kind in kinds)
    note = "layers that reuse the key selection of an earlier layer are described as dense latent attention"
    return assemble(view, trunk, blocks, norm=RMS_NORM, uncovered=(note,) if shared else ())


READERS = {
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v32": _deepseek_v32,
    "glm_moe_dsa": _glm_moe_dsa,
    "kimi_k2": _deepseek_v3,
    "mistral4": _mistral4,
}

"""Decoders with routed feed-forward layers and ordinary attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.errors import ModelConfigError
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Moe, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    RMS_NORM,
    SLIDING,
    Trunk,
    assemble,
    blocks_by_kind,
    check_heads,
    clamped,
    gated_mlp,
    grouped_attention,
    read_trunk,
    window_kinds,
    windowed,
)

__all__ = ["READERS", "check_routing", "shared_experts"]


def check_routing(view: ConfigView, moe: Moe) -> Moe:
    """The layer itself; raises when a token is sent to more experts than exist."""
    if moe.top_k > moe.experts:
        raise ModelConfigError(
            f"{view.owner} config: {moe.top_k} experts a token cannot be picked out of {moe.experts}."
        )
    return moe


def shared_experts(count: int, width: int, activation: str, name: str = "mlp.shared_experts") -> Mlp | None:
    """`count` shared experts are one gated layer of `count` times the width."""
    if count == 0:
        return None
    names = (f"{name}.gate_proj", f"{name}.up_proj", f"{name}.down_proj")
    return Mlp(width=count * width, gated=True, activation=activation, names=names)


def _mixtral(view: ConfigView) -> ModelShape:
    """Llama's attention, eight experts in every layer."""
    trunk = read_trunk(view, vocab=32_000, positions=131_072, tied=False)
    attention = grouped_attention(
        view, trunk.hidden, heads=32, kv_heads=8, window=view.maybe_int("sliding_window", None)
    )
    moe = Moe(
        experts=view.int("num_local_experts", 8, also=("num_experts",)),
        top_k=view.int("num_experts_per_tok", 2),
        width=view.int("intermediate_size", 14_336),
        activation=view.str("hidden_act", "silu"),
        routing="mixtral",
        jitter=view.float("router_jitter_noise", 0.0),
    )
    block = Block(mixer=attention, ffn=check_routing(view, moe), norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def _granitemoe(view: ConfigView) -> ModelShape:
    """Mixtral with constant multipliers on embeddings, branches and logits."""
    trunk = read_trunk(view, vocab=32_000, positions=2048, tied=False)
    view.ignore("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=32, qkv_bias=bias, out_bias=bias)
    moe = Moe(
        experts=view.int("num_local_experts", 8, also=("num_experts",)),
        top_k=view.int("num_experts_per_tok", 2),
        width=view.int("intermediate_size", 11_008),
        activation=view.str("hidden_act", "silu"),
        routing="granite",
        router_name="block_sparse_moe.router",
        experts_name="block_sparse_moe.experts",
    )
    block = Block(mixer=attention, ffn=check_routing(view, moe), norm=RMS_NORM, branch_scaled=True)
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, scaled=True),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, scaled=True),
    )


def sparse_layers(view: ConfigView, layers: int) -> list[bool]:
    """Qwen's rule for which layers are routed: every `decoder_sparse_step`-th but those of `mlp_only_layers`."""
    step = view.int("decoder_sparse_step", 1) if view.has("decoder_sparse_step") else 1
    dense = set(view.ints("mlp_only_layers") or ())
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]


def _qwen2_moe(view: ConfigView) -> ModelShape:
    """Sixty narrow experts beside a wide shared one behind a gate of its own."""
    trunk = read_trunk(view, vocab=151_936, positions=32_768, tied=False)
    if view.bool("use_sliding_window", False):
        window = view.maybe_int("sliding_window", 4096)
        first = view.int("max_window_layers", 28, minimum=0)
        kinds = window_kinds(view, trunk.layers, lambda layer: layer % 2 == 0 and layer < first)
    else:
        view.ignore("sliding_window", "max_window_layers")
        window, kinds = None, window_kinds(view, trunk.layers, lambda layer: False)
    attention = grouped_attention(view, trunk.hidden, heads=16, kv_heads=16, qkv_bias=view.bool("qkv_bias", True))
    activation = view.str("hidden_act", "silu")
    shared = shared_experts(1, view.int("shared_expert_intermediate_size", 5632), activation, "mlp.shared_expert")
    moe = Moe(
        experts=view.int("num_experts", 60),
        top_k=view.int("num_experts_per_tok", 4),
        width=view.int("moe_intermediate_size", 1408),
        activation=activation,
        routing="qwen",
        normalises_weights=view.bool("norm_topk_prob", False),
        shared=shared,
        shared_gate="mlp.shared_expert_gate",
    )
    return _routed(view, trunk, attention, moe, gated_mlp(view, 5632), kinds, window)


def _routed(
    view: ConfigView,
    trunk: Trunk,
    attention: Attention,
    moe: Moe,
    dense: Mlp,
    kinds: Sequence[str],
    window: int | None,
) -> ModelShape:
    check_routing(view, moe)
    sparse = sparse_layers(view, trunk.layers)

    def make(kind: tuple[str, bool]) -> Block:
        return Block(mixer=windowed(attention, kind[0], window), ffn=moe if kind[1] else dense, norm=RMS_NORM)

    blocks = blocks_by_kind(list(zip(kinds, sparse, strict=True)), make)
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _qwen3_moe(view: ConfigView) -> ModelShape:
    """Norms over heads, 128 experts, nothing shared. `head_dim` absent means H/A here, unlike the dense Qwen 3."""
    trunk = read_trunk(view, vocab=151_936, positions=32_768, tied=False)
    used = view.bool("use_sliding_window", False)
    size = view.maybe_int("sliding_window", 4096) if used else None
    view.ignore("max_window_layers", "sliding_window", "use_qk_norm")
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(
        view, trunk.hidden, heads=32, kv_heads=4, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM
    )
    moe = Moe(
        experts=view.int("num_experts", 128, also=("num_local_experts",)),
        top_k=view.int("num_experts_per_tok", 8),
        width=view.int("moe_intermediate_size", 768),
        activation=view.str("hidden_act", "silu"),
        routing="qwen",
        normalises_weights=view.bool("norm_topk_prob", False),
    )
    kinds = [SLIDING if size is not None else FULL] * trunk.layers
    return _routed(view, trunk, attention, moe, gated_mlp(view, 6144), kinds, size)


def _olmoe(view: ConfigView) -> ModelShape:
    """Norms over all query heads together and over all key heads together."""
    trunk = read_trunk(view, hidden=2048, layers=16, vocab=50_304, positions=4096, tied=False)
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(
        view, trunk.hidden, heads=16, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM, qk_norm_over="width"
    )
    moe = Moe(
        experts=view.int("num_experts", 64, also=("num_local_experts",)),
        top_k=view.int("num_experts_per_tok", 8),
        width=view.int("intermediate_size", 2048),
        activation=view.str("hidden_act", "silu"),
        routing="qwen",
        normalises_weights=view.bool("norm_topk_prob", False),
    )
    block = Block(mixer=attention, ffn=check_routing(view, moe), norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM, uncovered=clamped(view))


def _minimax_m2(view: ConfigView) -> ModelShape:
    """256 narrow experts scored by sigmoids, norms over all heads together, partly rotated heads."""
    trunk = read_trunk(view, vocab=200_064, positions=196_608, tied=False)
    stated = view.maybe_int("rotary_dim", None)
    attention = grouped_attention(
        view, trunk.hidden, heads=48, kv_heads=8, head_dim=128, qk_norm=RMS_NORM, qk_norm_over="width"
    )
    if stated is not None:
        attention = replace(attention, rotary_dim=stated)
    view.ignore("attn_type_list", "mtp_transformer_layers", "num_mtp_modules", "qk_norm_type", "use_mtp", "use_qk_norm")
    view.ignore("scoring_func", "use_routing_bias", "shared_intermediate_size", "layernorm_full_attention_beta")
    moe = Moe(
        experts=view.int("num_local_experts", 256, also=("num_experts",)),
        top_k=view.int("num_experts_per_tok", 8),
        width=view.int("intermediate_size", 1536),
        activation=view.str("hidden_act", "silu"),
        routing="minimax",
        jitter=view.float("router_jitter_noise", 0.0),
    )
    block = Block(mixer=attention, ffn=check_routing(view, moe), norm=RMS_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=RMS_NORM)


def _dbrx(view: ConfigView) -> ModelShape:
    """q, k and v in one matrix, norms without biases, experts stacked along the rows of three matrices."""
    trunk = read_trunk(
        view,
        vocab=32_000,
        positions=2048,
        tied=False,
        hidden_key="d_model",
        layers_key="n_layers",
        positions_key="max_seq_len",
    )
    heads = view.int("n_heads", 16, also=("num_attention_heads",))
    if trunk.hidden % heads:
        raise ModelConfigError(f"dbrx config: d_model {trunk.hidden} is not a multiple of {heads} heads.")
    inner, experts = view.sub("attn_config"), view.sub("ffn_config")
    inner.ignore(*inner.keys())
    experts.ignore(*experts.keys())
    kv_heads = inner.int("kv_n_heads", 1)
    check_heads(view, heads, kv_heads)
    view.ignore("emb_pdrop", "rope_theta")
    head_dim = trunk.hidden // heads
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        names=("norm_attn_norm.attn.Wqkv",),
        out_name="norm_attn_norm.attn.out_proj",
        rotary_dim=head_dim,
        dropout=inner.float("attn_pdrop", 0.0, maximum=1.0),
    )
    moe = Moe(
        experts=experts.int("moe_num_experts", 4),
        top_k=experts.int("moe_top_k", 1),
        width=experts.int("ffn_hidden_size", 3584),
        activation=experts.sub("ffn_act_fn").str("name", "silu"),
        router_name="ffn.router.layer",
        experts_name="ffn.experts.mlp",
        expert_names=("w1", "v1", "w2"),
        layout="rows",
    )
    norm = Norm(kind="layernorm", fp32=False)
    block = Block(
        mixer=attention,
        ffn=check_routing(view, moe),
        norm=norm,
        norm_names=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        dropout=view.float("resid_pdrop", 0.0, maximum=1.0),
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=norm,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="transformer.wte"),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=norm, norm_name="transformer.norm_f"),
        prefix="transformer.blocks",
        uncovered=clamped(inner),
    )


def _gpt_oss(view: ConfigView) -> ModelShape:
    """Biases everywhere, also in router and experts; a learned sink for each head; every other layer slides."""
    trunk = read_trunk(view, vocab=201_088, positions=131_072, tied=False)
    bias = view.bool("attention_bias", True)
    window = view.maybe_int("sliding_window", 128)
    attention = grouped_attention(
        view, trunk.hidden, heads=64, kv_heads=8, head_dim=64, qkv_bias=bias, out_bias=bias, sinks=True
    )
    view.ignore("swiglu_limit", "swiglu_alpha", "experts_per_token", "initial_context_length")
    moe = Moe(
        experts=view.int("num_local_experts", 128, also=("num_experts",)),
        top_k=view.int("num_experts_per_tok", 4),
        width=view.int("intermediate_size", 2880),
        activation="gpt_oss_swiglu",
        expert_bias=True,
        routing="gpt_oss",
        router_name="mlp.router",
        router_bias=True,
        layout="in-out",
    )
    view.ignore("hidden_act")
    check_routing(view, moe)
    kinds = window_kinds(view, trunk.layers, lambda layer: layer % 2 == 0)
    blocks = blocks_by_kind(kinds, lambda kind: Block(mixer=windowed(attention, kind, window), ffn=moe, norm=RMS_NORM))
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _ernie4_5_moe(view: ConfigView) -> ModelShape:
    """The first layer dense, then 64 experts beside two shared ones; a correction bias that is a frozen parameter."""
    trunk = read_trunk(view, hidden=2560, layers=28, vocab=103_424, positions=131_072, tied=True)
    bias = view.bool("use_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=20, kv_heads=4, qkv_bias=bias, out_bias=bias)
    dense = gated_mlp(view, 12_288, bias=bias)
    width = view.int("moe_intermediate_size", 1536)
    shared = shared_experts(view.int("moe_num_shared_experts", 2, minimum=0), width, dense.activation)
    moe = Moe(
        experts=view.int("moe_num_experts", 64, also=("num_experts",)),
        top_k=view.int("moe_k", 6, also=("num_experts_per_tok",)),
        width=width,
        activation=dense.activation,
        score_bias=True,
        routing="ernie",
        score_bias_name="mlp.gate.moe_statics.e_score_correction_bias",
        shared=None if shared is None else replace(shared, up_bias=bias, down_bias=bias),
    )
    check_routing(view, moe)
    start = view.int("moe_layer_start_index", 1, minimum=0)
    end = view.int("moe_layer_end_index", -1, minimum=-1)
    interval = view.int("moe_layer_interval", 1)
    view.ignore("moe_norm_min", "moe_capacity", "moe_gate", "moe_use_aux_free", "num_nextn_predict_layers")
    last = trunk.layers - 1 if end == -1 else end
    sparse = [start <= layer <= last and (layer + 1) % interval == 0 for layer in range(trunk.layers)]
    blocks = blocks_by_kind(sparse, lambda routed: Block(mixer=attention, ffn=moe if routed else dense, norm=RMS_NORM))
    head = Head(rows=trunk.vocab, tied=trunk.tied, bias=bias, norm=RMS_NORM)
    return assemble(view, trunk, blocks, norm=RMS_NORM, head=head)


def _glm4_moe(view: ConfigView) -> ModelShape:
    """First layers dense, then experts beside one shared; half of each head rotated. Prediction heads do not count."""
    trunk = read_trunk(view, hidden=4096, layers=46, vocab=151_552, positions=131_072, tied=False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=96,
        kv_heads=8,
        qkv_bias=view.bool("attention_bias", False),
        rotary=0.5,
        qk_norm=RMS_NORM if view.bool("use_qk_norm", False) else None,
    )
    dense = gated_mlp(view, 10_944)
    width = view.int("moe_intermediate_size", 1408)
    moe = Moe(
        experts=view.int("n_routed_experts", 128, also=("num_local_experts",)),
        top_k=view.int("num_experts_per_tok", 8),
        width=width,
        activation=dense.activation,
        routing="deepseek_v3",
        normalises_weights=view.bool("norm_topk_prob", True),
        groups=view.int("n_group", 1),
        shared=shared_experts(view.int("n_shared_experts", 1, minimum=0), width, dense.activation),
    )
    check_routing(view, moe)
    first = view.int("first_k_dense_replace", 1, minimum=0)
    view.ignore("topk_group", "routed_scaling_factor")
    view.ignore("num_nextn_predict_layers", "num_mtp_layers")
    blocks = blocks_by_kind(
        [layer >= first for layer in range(trunk.layers)],
        lambda routed: Block(mixer=attention, ffn=moe if routed else dense, norm=RMS_NORM),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


def _mimo_v2_flash(view: ConfigView) -> ModelShape:
    """Sliding layers with twice the key/value heads and sinks, one full layer in six; values narrower than keys."""
    trunk = read_trunk(view, vocab=152_576, positions=131_072, tied=False)
    stated = view.maybe_int("sliding_window_size", None)
    window = stated + 1 if stated is not None else view.int("sliding_window", 129)
    view.ignore("sliding_window", "attention_value_scale", "routed_scaling_factor")
    view.ignore(
        "topk_group", "scoring_func", "topk_method", "hybrid_layer_pattern", "moe_layer_freq", "n_shared_experts"
    )
    view.ignore(
        "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim", "swa_rope_theta"
    )
    view.ignore("add_full_attention_sink_bias", "add_swa_attention_sink_bias", "attention_chunk_size")
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=64,
        kv_heads=4,
        head_dim=192,
        qkv_bias=view.bool("attention_bias", False),
        rotary=0.334,
        value_dim=view.int("v_head_dim", 128),
    )
    sliding = replace(attention, kv_heads=2 * attention.kv_heads, sinks=True, window=window)
    dense = gated_mlp(view, 16_384)
    moe = Moe(
        experts=view.int("n_routed_experts", 256, also=("num_local_experts",)),
        top_k=view.int("num_experts_per_tok", 8),
        width=view.int("moe_intermediate_size", 2048),
        activation=dense.activation,
        routing="deepseek_v3",
        normalises_weights=view.bool("norm_topk_prob", True),
        groups=view.maybe_int("n_group", 1) or 1,
    )
    check_routing(view, moe)
    kinds = window_kinds(view, trunk.layers, lambda layer: layer != 0 and (layer + 1) % 6 != 0)
    parts = view.strings("mlp_layer_types", length=trunk.layers, among=("dense", "sparse"))
    if parts is None:
        parts = ["dense"] + ["sparse"] * (trunk.layers - 1)
    blocks = blocks_by_kind(
        list(zip(kinds, parts, strict=True)),
        lambda kind: Block(
            mixer=sliding if kind[0] == SLIDING else attention,
            ffn=moe if kind[1] == "sparse" else dense,
            norm=RMS_NORM,
        ),
    )
    return assemble(view, trunk, blocks, norm=RMS_NORM)


READERS = {
    "dbrx": _dbrx,
    "ernie4_5_moe": _ernie4_5_moe,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "granitemoe": _granitemoe,
    "mimo_v2_flash": _mimo_v2_flash,
    "minimax_m2": _minimax_m2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}

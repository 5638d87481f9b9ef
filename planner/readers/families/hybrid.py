"""Stacks that mix recurrent layers with attention: Jamba, Nemotron-H, Qwen3-Next, Granite 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from planner.errors import ModelConfigError
from planner.model.shape import (
    Block,
    Embedding,
    GatedDeltaNet,
    Head,
    Mamba1,
    Mamba2,
    Mlp,
    ModelShape,
    Moe,
    Norm,
)
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    MOST_LAYERS,
    RMS_NORM,
    Trunk,
    assemble,
    blocks_by_kind,
    gated_mlp,
    grouped_attention,
    read_trunk,
)
from planner.readers.families.mamba import dt_rank
from planner.readers.families.moe import check_routing, shared_experts, sparse_layers

__all__ = ["READERS", "gated_delta_net", "linear_kinds"]

_RECURRENT: Final = ("linear_attention", "mamba")
_FULL: Final = ("full_attention", "attention")


def linear_kinds(view: ConfigView, layers: int, interval: int = 4) -> list[bool]:
    """For each layer whether it is recurrent: `layer_types`, or all but every `full_attention_interval`-th."""
    stated = view.strings("layer_types", length=layers, among=(*_RECURRENT, *_FULL))
    every = view.int("full_attention_interval", interval) if view.has("full_attention_interval") else interval
    if stated is not None:
        return [kind in _RECURRENT for kind in stated]
    return [(layer + 1) % every != 0 for layer in range(layers)]


def gated_delta_net(view: ConfigView, *, value_heads: int = 32) -> GatedDeltaNet:
    """The gated delta rule under Qwen's keys, with the defaults of the reference class."""
    mixer = GatedDeltaNet(
        key_heads=view.int("linear_num_key_heads", 16),
        value_heads=view.int("linear_num_value_heads", value_heads),
        key_dim=view.int("linear_key_head_dim", 128),
        value_dim=view.int("linear_value_head_dim", 128),
        conv=view.int("linear_conv_kernel_dim", 4),
    )
    if mixer.value_heads % mixer.key_heads:
        raise view.fail("linear_num_value_heads", f"a multiple of the {mixer.key_heads} key heads")
    return mixer


def _qwen3_next(view: ConfigView) -> ModelShape:
    """Three gated delta layers to each gated attention layer; 512 experts beside a shared one."""
    trunk = read_trunk(view, vocab=151_936, positions=32_768, tied=False)
    norm = Norm(kind="rmsnorm_1p")
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=16,
        kv_heads=2,
        head_dim=256,
        qkv_bias=bias,
        out_bias=bias,
        rotary=0.25,
        qk_norm=norm,
        gate=True,
    )
    delta = gated_delta_net(view)
    dense = gated_mlp(view, 5632)
    shared = view.int("shared_expert_intermediate_size", 512)
    moe = Moe(
        experts=view.int("num_experts", 512),
        top_k=view.int("num_experts_per_tok", 10),
        width=view.int("moe_intermediate_size", 512),
        activation=dense.activation,
        shared=shared_experts(1, shared, dense.activation, "mlp.shared_expert"),
        shared_gate="mlp.shared_expert_gate",
        routing="qwen",
        normalises_weights=view.bool("norm_topk_prob", True),
    )
    check_routing(view, moe)
    view.ignore("use_sliding_window", "sliding_window", "max_window_layers")
    kinds = list(zip(linear_kinds(view, trunk.layers), sparse_layers(view, trunk.layers), strict=True))
    blocks = blocks_by_kind(
        kinds,
        lambda kind: Block(mixer=delta if kind[0] else attention, ffn=moe if kind[1] else dense, norm=norm),
    )
    return assemble(view, trunk, blocks, norm=norm)


def _periodic(view: ConfigView, name: str, period: int, offset: int, layers: int) -> list[bool]:
    """Jamba's rule: layer % period == offset."""
    every = view.int(f"{name}_layer_period", period)
    start = view.int(f"{name}_layer_offset", offset, minimum=0)
    if start >= every:
        raise view.fail(f"{name}_layer_offset", f"a value below {name}_layer_period, {every}")
    return [layer % every == start for layer in range(layers)]


def _jamba(view: ConfigView) -> ModelShape:
    """One attention layer in eight, without positions; experts in every other layer; Mamba 1 with three norms."""
    trunk = read_trunk(view, hidden=4096, layers=32, vocab=65_536, positions=262_144, tied=False)
    attention = replace(grouped_attention(view, trunk.hidden, heads=32, kv_heads=8), rotary_dim=0)
    mamba = Mamba1(
        inner=view.int("mamba_expand", 2) * trunk.hidden,
        state=view.int("mamba_d_state", 16),
        conv=view.int("mamba_d_conv", 4),
        dt_rank=dt_rank(view, "mamba_dt_rank", trunk.hidden),
        conv_bias=view.bool("mamba_conv_bias", True),
        proj_bias=view.bool("mamba_proj_bias", False),
        norms="weighted",
        name="mamba",
    )
    names = ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
    dense = replace(gated_mlp(view, 14_336), names=names)
    experts = view.int("num_experts", 16, also=("num_local_experts",))
    moe = Moe(
        experts=experts,
        top_k=min(view.int("num_experts_per_tok", 2), experts),
        width=dense.width,
        activation=dense.activation,
        router_name="feed_forward.router",
        experts_name="feed_forward.experts",
        routing="qwen",
    )
    view.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "sliding_window")
    view.ignore("mamba_inner_layernorms")
    attends = _periodic(view, "attn", 8, 4, trunk.layers)
    routed = _periodic(view, "expert", 2, 1, trunk.layers)
    blocks = blocks_by_kind(
        list(zip(attends, routed, strict=True)),
        lambda kind: Block(
            mixer=attention if kind[0] else mamba,
            ffn=moe if kind[1] and experts > 1 else dense,
            norm=RMS_NORM,
            norm_names=("input_layernorm", "pre_ff_layernorm"),
        ),
    )
    head = Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, norm_name="model.final_layernorm")
    return assemble(view, trunk, blocks, norm=RMS_NORM, head=head)


_NEMOTRON_LETTERS: Final = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


def _nemotron_kinds(view: ConfigView) -> list[str]:
    """`layers_block_type`, or the letters of `hybrid_override_pattern`."""
    stated = view.strings("layers_block_type", among=(*_RECURRENT, *_FULL, "moe", "mlp"))
    pattern = view.str("hybrid_override_pattern", "")
    if stated is not None:
        renamed = {"linear_attention": "mamba", "full_attention": "attention"}
        kinds = [renamed.get(kind, kind) for kind in stated]
    elif set(pattern) <= set(_NEMOTRON_LETTERS):
        kinds = [_NEMOTRON_LETTERS[letter] for letter in pattern]
    else:
        raise view.fail("hybrid_override_pattern", "letters out of M, E, * and -")
    if not 0 < len(kinds) <= MOST_LAYERS:
        raise view.fail("layers_block_type", f"1 to {MOST_LAYERS} layers, or hybrid_override_pattern")
    return kinds


def _nemotron_h(view: ConfigView) -> ModelShape:
    """One norm and one part a layer: Mamba 2, attention without positions, a feed-forward, or experts.

    The reference class builds attention without biases, whatever `attention_bias` says.
    """
    kinds = _nemotron_kinds(view)
    view.ignore("num_hidden_layers")
    trunk = Trunk(
        hidden=view.int("hidden_size"),
        layers=len(kinds),
        vocab=view.int("vocab_size", 131_072),
        max_positions=view.int("max_position_embeddings", 4096),
        tied=view.bool("tie_word_embeddings", False),
    )
    view.ignore("attention_bias", "attention_head_dim", "expand", "time_step_rank", "sliding_window")
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        kv_heads=8,
        head_dim=view.int("attention_head_dim") if view.has("attention_head_dim") else 128,
        names=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        out_name="mixer.o_proj",
    )
    heads, head_dim = view.int("mamba_num_heads", 128), view.int("mamba_head_dim", 64)
    mamba = Mamba2(
        inner=heads * head_dim,
        heads=heads,
        head_dim=head_dim,
        state=view.int("ssm_state_size", 128),
        groups=view.int("n_groups", 8, also=("mamba_n_groups",)),
        conv=view.int("conv_kernel", 4, also=("mamba_d_conv",)),
        conv_bias=view.bool("use_conv_bias", True),
        proj_bias=view.bool("use_bias", False),
        chunk=view.int("chunk_size", 128, also=("mamba_chunk_size",)),
    )
    mlp_bias = view.bool("mlp_bias", False)
    activation = view.str("mlp_hidden_act", "relu2")
    plain = Mlp(
        width=view.int("intermediate_size", 21_504),
        gated=False,
        activation=activation,
        names=("mixer.up_proj", "mixer.down_proj"),
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )
    parts: dict[str, Block] = {
        "attention": Block(mixer=replace(attention, rotary_dim=0), ffn=None),
        "mamba": Block(mixer=mamba, ffn=None),
        "mlp": Block(mixer=None, ffn=plain),
    }
    if "moe" in kinds:
        parts["moe"] = Block(mixer=None, ffn=_nemotron_experts(view, plain))
    else:
        view.ignore("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
        view.ignore("moe_shared_expert_intermediate_size", "moe_latent_size")
    view.ignore("mamba_hidden_act", "use_mamba_kernels", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap")
    view.ignore("mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers", "n_group")
    view.ignore("topk_group", "norm_topk_prob", "routed_scaling_factor", "residual_in_fp32", "mamba_proj_bias")
    view.ignore(
        "rescale_prenorm_residual", "num_logits_to_keep", "hidden_dropout", "mamba_expand", "partial_rotary_factor"
    )
    blocks = blocks_by_kind(
        kinds, lambda kind: replace(parts[kind], residual="single", norm=RMS_NORM, norm_names=("norm",))
    )
    return assemble(
        view,
        trunk,
        blocks,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="model.embeddings"),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, norm_name="model.norm_f"),
    )


def _nemotron_experts(view: ConfigView, plain: Mlp) -> Moe:
    """Experts without gates; from Nemotron 3 Super on they work on a narrower projection of the stream."""
    shared = view.int("moe_shared_expert_intermediate_size", 7688) * view.int("n_shared_experts", 1, minimum=0)
    moe = Moe(
        experts=view.int("n_routed_experts", 8, also=("num_local_experts",)),
        top_k=view.int("num_experts_per_tok", 2),
        width=view.int("moe_intermediate_size", 7688),
        activation=plain.activation,
        gated=False,
        router_name="mixer.gate",
        experts_name="mixer.experts",
        expert_names=("up_proj", "down_proj"),
        routing="deepseek_v3",
        normalises_weights=view.bool("norm_topk_prob", True),
        latent=view.maybe_int("moe_latent_size", None),
        latent_bias=plain.up_bias,
        shared=replace(plain, width=shared, names=("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"))
        if shared
        else None,
    )
    return check_routing(view, moe)


def _granitemoehybrid(view: ConfigView) -> ModelShape:
    """Granite 4: Mamba 2 or attention, then a shared gated layer with experts beside it where there are any."""
    trunk = read_trunk(view, vocab=32_000, positions=2048, tied=False)
    view.ignore("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    view.ignore("normalization_function", "init_method", "time_step_limit", "time_step_min", "time_step_max")
    bias = view.bool("attention_bias", False)
    attention = grouped_attention(view, trunk.hidden, heads=32, qkv_bias=bias, out_bias=bias)
    if view.str("position_embedding_type", "none") != "rope":
        attention = replace(attention, rotary_dim=0)
    kinds = view.strings("layer_types", length=trunk.layers, among=(*_RECURRENT, *_FULL)) or view.strings(
        "layers_block_type", length=trunk.layers, among=(*_RECURRENT, *_FULL)
    )
    inner = view.int("mamba_expand", 2) * trunk.hidden
    heads = view.int("mamba_n_heads", 128)
    if inner % heads:
        raise ModelConfigError(f"granitemoehybrid config: inner width {inner} is not a multiple of {heads} heads.")
    view.ignore("mamba_d_head")
    mamba = Mamba2(
        inner=inner,
        heads=heads,
        head_dim=inner // heads,
        state=view.int("mamba_d_state", 256),
        groups=view.int("mamba_n_groups", 1),
        conv=view.int("mamba_d_conv", 4),
        conv_bias=view.bool("mamba_conv_bias", True),
        proj_bias=view.bool("mamba_proj_bias", False),
        chunk=view.int("mamba_chunk_size", 256),
        name="mamba",
    )
    activation = view.str("hidden_act", "silu")
    shared = Mlp(
        width=view.int("shared_intermediate_size", 1024),
        gated=True,
        activation=activation,
        names=("shared_mlp.input_linear", "shared_mlp.output_linear"),
    )
    experts = view.int("num_local_experts", 8, minimum=0)
    ffn: Mlp | Moe = shared
    width, top_k = view.int("intermediate_size", 11_008), view.int("num_experts_per_tok", 2, minimum=0)
    if experts:
        ffn = Moe(
            experts=experts,
            top_k=top_k,
            width=width,
            activation=activation,
            router_name="block_sparse_moe.router",
            experts_name="block_sparse_moe.experts",
            routing="granite",
            shared=shared,
        )
        check_routing(view, ffn)
    blocks = blocks_by_kind(
        kinds or ["linear_attention"] * trunk.layers,
        lambda kind: Block(
            mixer=mamba if kind in _RECURRENT else attention, ffn=ffn, norm=RMS_NORM, branch_scaled=True
        ),
    )
    return assemble(
        view,
        trunk,
        blocks,
        norm=RMS_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, scaled=True),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=RMS_NORM, scaled=True),
    )


READERS = {
    "granitemoehybrid": _granitemoehybrid,
    "jamba": _jamba,
    "nemotron_h": _nemotron_h,
    "qwen3_next": _qwen3_next,
}

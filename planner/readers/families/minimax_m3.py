"""MiniMax M3: experts behind a few dense layers, attention to blocks of keys that an indexer picks, and images.

The reference class is `MiniMaxM3SparseForConditionalGeneration` of transformers 5. The published config of type
`minimax_m3` describes the text part alone.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import Attention, Block, Component, Mlp, ModelShape, Moe, Norm, Tower, Weight
from planner.readers.config_view import ConfigView
from planner.readers.families.clip import clip_block
from planner.readers.families.decoder import (
    FULL,
    LAYER_NORM,
    MOST_LAYERS,
    assemble,
    blocks_by_kind,
    grouped_attention,
    read_trunk,
)
from planner.readers.families.moe import check_routing
from planner.readers.families.multimodal import text_decoder, with_towers

__all__ = ["READERS"]

_NORM = Norm(kind="rmsnorm_1p")
_SPARSE = "minimax_m3_sparse"
_ACTIVATION = "swigluoai"


def _indexer(view: ConfigView, hidden: int) -> tuple[Weight, ...]:
    """The small branch that scores blocks of keys: heads of its own for queries, one for keys, both normalised."""
    sparse = view.sub("sparse_attention_config")
    sparse.ignore(*sparse.keys())
    heads = view.int("index_n_heads", sparse.int("sparse_num_index_heads", 4))
    size = view.int("index_head_dim", sparse.int("sparse_index_dim", 128))
    view.ignore("index_block_size", "index_topk_blocks", "index_local_blocks")
    path = "self_attn.indexer"
    return (
        *linear_weights(f"{path}.q_proj", heads * size, hidden, bias=False, component="attention"),
        *linear_weights(f"{path}.k_proj", size, hidden, bias=False, component="attention"),
        *norm_weights(_NORM, f"{path}.q_norm", size),
        *norm_weights(_NORM, f"{path}.k_norm", size),
    )


def _kinds(view: ConfigView, layers: int) -> list[tuple[bool, bool]]:
    """For each layer whether its attention is sparse and whether it routes, as lists of names or of 0 and 1."""
    attention = view.strings("layer_types", length=layers, among=(FULL, _SPARSE))
    flags = view.sub("sparse_attention_config").ints("sparse_attention_freq", length=layers)
    sparse = [kind == _SPARSE for kind in attention] if attention else [bool(flag) for flag in flags or [0] * layers]
    feed_forward = view.strings("mlp_layer_types", length=layers, among=("dense", "sparse"))
    frequency = view.ints("moe_layer_freq", length=layers)
    if feed_forward:
        routed = [kind == "sparse" for kind in feed_forward]
    else:
        routed = [bool(flag) for flag in frequency or [1] * layers]
    return list(zip(sparse, routed, strict=True))


def _text(view: ConfigView) -> ModelShape:
    """The text decoder; the heads that predict further tokens are not part of the reference class."""
    trunk = read_trunk(view, vocab=200_064, positions=524_288, tied=False)
    rotary = view.int("rotary_dim", 64)
    attention = grouped_attention(view, trunk.hidden, heads=64, kv_heads=4, head_dim=128, qk_norm=_NORM)
    attention = replace(attention, rotary_dim=rotary)
    names = ("mlp.gate_up_proj", "mlp.down_proj")
    width = view.int("dense_intermediate_size", 12_288)
    dense = Mlp(width=width, gated=True, activation=_ACTIVATION, names=names)
    shared_names = ("mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj")
    shared = replace(dense, width=view.int("shared_intermediate_size", 3072), names=shared_names)
    moe = Moe(
        experts=view.int("num_local_experts", 128, also=("num_experts",)),
        top_k=view.int("num_experts_per_tok", 4),
        width=view.int("intermediate_size", 3072),
        activation=_ACTIVATION,
        shared=shared,
        jitter=view.float("router_jitter_noise", 0.0),
    )
    check_routing(view, moe)
    if view.int("n_shared_experts", 1) != 1:
        raise view.fail("n_shared_experts", "1; the reference class has one shared expert")
    view.ignore("hidden_act", "swiglu_alpha", "swiglu_limit", "moe_intermediate_size", "first_k_dense_replace")
    view.ignore("attention_output_gate", "qk_norm_type", "use_gemma_norm", "use_qk_norm", "use_routing_bias")
    view.ignore("num_mtp_modules", "num_nextn_predict_layers", "partial_rotary_factor", "scoring_func")
    kinds, indexer = _kinds(view, trunk.layers), _indexer(view, trunk.hidden)

    def make(kind: tuple[bool, bool]) -> Block:
        sparse, routed = kind
        return Block(mixer=attention, ffn=moe if routed else dense, norm=_NORM, extra=indexer if sparse else ())

    uncovered = ("the indexer of sparse attention, its cache, and the mask built from it",)
    return assemble(
        view,
        trunk,
        blocks_by_kind(kinds, make),
        norm=_NORM,
        uncovered=uncovered if any(sparse for sparse, _ in kinds) else (),
    )


def _tower(view: ConfigView) -> Tower:
    """CLIP's blocks over patches of two frames; two thirds of each head rotate by time, height and width."""
    path, hidden, side = "model.vision_tower", view.int("hidden_size", 1280), view.int("patch_size", 14)
    view.ignore("image_size", "spatial_merge_size")
    plain = clip_block(view, hidden, heads=16, width=5120, act="gelu")
    assert isinstance(plain.mixer, Attention)
    axis = 2 * (plain.mixer.head_dim // 3 // 2)
    block = replace(plain, mixer=replace(plain.mixer, rotary_dim=3 * axis))
    kernel = (view.int("temporal_patch_size", 2), side, side)
    patches = convolution_weights(
        f"{path}.embeddings.proj",
        hidden,
        view.int("num_channels", 3),
        kernel,
        bias=False,
        component="vision_or_audio",
    )
    return Tower(
        name=f"{path}.layers",
        role="vision",
        hidden=hidden,
        blocks=(block,) * view.int("num_hidden_layers", 32, maximum=MOST_LAYERS),
        extra=patches + norm_weights(LAYER_NORM, f"{path}.pre_layrnorm", hidden),
    )


def _minimax_m3(view: ConfigView) -> ModelShape:
    """Each patch is projected, then the patches of one square are merged into one token."""
    text = text_decoder(view, "minimax_m3_vl_text", {"minimax_m3": "minimax_m3_vl_text"})
    view.ignore("merged_hidden_size")
    vision = view.sub("vision_config", "minimax_m3_vl_vision")
    tower, path = _tower(vision), "model.multi_modal_projector"
    inner = view.int("projector_hidden_size", 6144)
    merged = text.hidden * vision.int("spatial_merge_size", 2) ** 2
    part: Component = "vision_or_audio"
    projector = (
        *linear_weights(f"{path}.linear_1", inner, tower.hidden, bias=True, component=part),
        *linear_weights(f"{path}.linear_2", text.hidden, inner, bias=True, component=part),
        *linear_weights(f"{path}.merge_linear_1", inner, merged, bias=True, component=part),
        *linear_weights(f"{path}.merge_linear_2", text.hidden, inner, bias=True, component=part),
    )
    return with_towers(
        view,
        text,
        towers=(replace(tower, extra=tower.extra + projector),),
        uncovered=("patch embedding of the image", "projector and patch merger"),
        tied=False,
    )


READERS = {"minimax_m3": _text, "minimax_m3_vl": _minimax_m3, "minimax_m3_vl_text": _text}

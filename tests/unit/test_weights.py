"""The weights of single layers, counted by hand, and the laws that every model obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.ledger.weights import (
    active_parameters,
    block_weights,
    embedding_weights,
    head_weights,
    model_weights,
    named_weights,
    parameter_counts,
)
from planner.model.shape import (
    Attention,
    Block,
    Embedding,
    GatedDeltaNet,
    Head,
    LatentAttention,
    Mamba1,
    Mamba2,
    Mlp,
    ModelShape,
    Moe,
    Norm,
    Tower,
    Weight,
)

RMS = Norm(kind="rmsnorm")
ATTENTION = Attention(heads=8, kv_heads=2, head_dim=16)
MLP = Mlp(width=200, gated=True, activation="silu")
HIDDEN = 64


def count(weights: tuple[Weight, ...]) -> int:
    return sum(weight.count for weight in weights)


def shapes(block: Block) -> dict[str, tuple[int, ...]]:
    return {weight.name: weight.shape for weight in block_weights(block, HIDDEN)}


def decoder(*blocks: Block, tied: bool = False) -> ModelShape:
    return ModelShape(
        name="toy",
        model_type="llama",
        hidden=HIDDEN,
        blocks=blocks,
        embedding=Embedding(rows=100, size=HIDDEN),
        head=Head(rows=100, tied=tied, norm=RMS),
    )


def test_llama_block_by_hand() -> None:
    block = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    by_hand = 128 * 64 + 2 * (32 * 64) + 64 * 128 + 3 * (200 * 64) + 2 * 64
    assert count(block_weights(block, HIDDEN)) == by_hand
    assert shapes(block)["self_attn.k_proj.weight"] == (32, 64)
    assert shapes(block)["mlp.down_proj.weight"] == (64, 200)


@pytest.mark.parametrize("names", [("qkv",), ("q", "kv"), ("q", "k", "v")])
def test_fusing_projections_moves_no_weights(names: tuple[str, ...]) -> None:
    fused = replace(ATTENTION, names=names, q_bias=True, k_bias=True, v_bias=True)
    assert count(block_weights(Block(mixer=fused, ffn=None), HIDDEN)) == 192 * 64 + 192 + 64 * 128


def test_attention_options_add_what_they_say() -> None:
    plain = count(block_weights(Block(mixer=ATTENTION, ffn=None), HIDDEN))

    def added(**changes: object) -> int:
        return count(block_weights(Block(mixer=replace(ATTENTION, **changes), ffn=None), HIDDEN)) - plain

    assert added(out_bias=True) == 64
    assert added(q_bias=True) == 128
    assert added(sinks=True) == 8
    assert added(gate=True) == 128 * 64
    assert added(qk_norm=RMS) == 2 * 16
    assert added(qk_norm=RMS, qk_norm_over="width") == 128 + 32
    assert added(qk_norm=RMS, qk_norm_over="heads") == 128 + 32
    assert added(relative_buckets=32) == 32 * 8
    assert added(value_dim=8) == -(2 * 8 * 64) - 64 * 64
    assert added(shares_kv=True) == -2 * 32 * 64
    assert added(kv_input=32) == -2 * 32 * 32
    assert added(window=4096, softcap=True, dropout=0.1, rotary_dim=16) == 0


def test_latent_attention_by_hand() -> None:
    mixer = LatentAttention(heads=4, q_rank=24, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6)
    by_hand = 24 * 64 + 24 + 48 * 24 + 16 * 64 + 12 + 56 * 12 + 64 * 24
    assert count(block_weights(Block(mixer=mixer, ffn=None), HIDDEN)) == by_hand
    direct = replace(mixer, q_rank=None)
    assert by_hand - count(block_weights(Block(mixer=direct, ffn=None), HIDDEN)) == 24 * 64 + 24 + 48 * 24 - 48 * 64
    indexed = replace(mixer, index_heads=2, index_dim=10, index_top_k=5)
    assert count(block_weights(Block(mixer=indexed, ffn=None), HIDDEN)) - by_hand == 20 * 24 + 10 * 64 + 20 + 2 * 64


def test_recurrent_mixers_by_hand() -> None:
    mamba = Mamba1(inner=128, state=16, conv=4, dt_rank=4)
    by_hand = 256 * 64 + 128 * 4 + 128 + 36 * 128 + 128 * 4 + 128 + 128 * 16 + 128 + 64 * 128
    assert count(block_weights(Block(mixer=mamba, ffn=None), HIDDEN)) == by_hand
    normed = replace(mamba, norms="weighted")
    assert count(block_weights(Block(mixer=normed, ffn=None), HIDDEN)) - by_hand == 4 + 16 + 16
    ssd = Mamba2(inner=128, heads=8, head_dim=16, state=16, groups=2, conv=4)
    channels = 128 + 2 * 2 * 16
    by_hand = (128 + channels + 8) * 64 + channels * 5 + 3 * 8 + 128 + 64 * 128
    assert count(block_weights(Block(mixer=ssd, ffn=None), HIDDEN)) == by_hand
    delta = GatedDeltaNet(key_heads=2, value_heads=4, key_dim=8, value_dim=8, conv=4)
    by_hand = (2 * 16 + 2 * 32) * 64 + 8 * 64 + (2 * 16 + 32) * 4 + 2 * 4 + 8 + 64 * 32
    assert count(block_weights(Block(mixer=delta, ffn=None), HIDDEN)) == by_hand
    split = replace(delta, projections="split")
    assert count(block_weights(Block(mixer=split, ffn=None), HIDDEN)) == by_hand


def test_experts_stacked_or_apart_are_as_many() -> None:
    stacked = Moe(experts=8, top_k=2, width=20, activation="silu")
    apart = replace(stacked, stacked=False, expert_names=("gate_proj", "up_proj", "down_proj"))
    for moe in (stacked, replace(stacked, layout="in-out"), replace(stacked, layout="rows"), apart):
        assert count(block_weights(Block(mixer=None, ffn=moe), HIDDEN)) == 8 * 64 + 8 * 3 * 20 * 64
    assert shapes(Block(mixer=None, ffn=stacked))["mlp.experts.gate_up_proj"] == (8, 40, 64)
    assert shapes(Block(mixer=None, ffn=replace(stacked, layout="in-out")))["mlp.experts.down_proj"] == (8, 20, 64)
    plain = replace(stacked, gated=False, expert_names=("up_proj", "down_proj"), latent=16)
    by_hand = 8 * 64 + 8 * 2 * 20 * 16 + 2 * 16 * 64
    assert count(block_weights(Block(mixer=None, ffn=plain), HIDDEN)) == by_hand


def test_active_parameters_leave_out_the_experts_not_asked() -> None:
    moe = Moe(experts=8, top_k=2, width=20, activation="silu", shared=MLP, shared_gate="mlp.shared_gate")
    sparse = Block(mixer=ATTENTION, ffn=moe, norm=RMS)
    dense = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    model = decoder(dense, sparse, sparse)
    total = parameter_counts(model)["total"]
    assert active_parameters(model) == total - 2 * 6 * 3 * 20 * 64
    assert active_parameters(decoder(dense)) == parameter_counts(decoder(dense))["total"]


def test_a_norm_without_weights_owns_none() -> None:
    assert block_weights(Block(mixer=None, ffn=None, norm=Norm(kind="layernorm", affine=False)), HIDDEN) == ()
    assert block_weights(Block(mixer=None, ffn=None, norm=None), HIDDEN) == ()
    assert count(block_weights(Block(mixer=None, ffn=None, norm=Norm(kind="layernorm", bias=True)), HIDDEN)) == 256


def test_ties_count_once() -> None:
    block = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    untied, tied = parameter_counts(decoder(block)), parameter_counts(decoder(block, tied=True))
    assert untied["total"] - tied["total"] == untied["lm_head"] == 100 * 64
    assert tied["lm_head"] == 0 and tied["embed_in"] == 100 * 64
    assert head_weights(Head(rows=100, tied=True, bias=True), 64) == (
        Weight(name="lm_head.bias", shape=(100,), component="lm_head", kind="bias"),
    )


def test_embedding_parts() -> None:
    embedding = Embedding(
        rows=100,
        size=32,
        positions=20,
        position_size=64,
        position_name="wpe",
        types=2,
        type_name="wtt",
        norm=Norm(kind="layernorm", bias=True),
        norm_name="ln",
        projection=64,
        projection_name="project_in",
    )
    assert count(embedding_weights(embedding)) == 100 * 32 + 20 * 64 + 2 * 32 + 2 * 32 + 64 * 32
    assert embedding_weights(None) == ()


def test_equal_blocks_are_one_group_whatever_object_they_are() -> None:
    first = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    other = replace(first, mixer=replace(ATTENTION, window=128))
    again = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    groups = [group for group in model_weights(decoder(first, other, again, first)) if group.layers]
    assert [group.layers for group in groups] == [(0, 2, 3), (1,)]
    assert [group.repeat for group in groups] == [3, 1]
    assert sum(group.count for group in groups) == 4 * count(block_weights(first, HIDDEN))


def test_names_are_unique_and_add_up() -> None:
    block = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    names = [name for name, _ in named_weights(decoder(block, block))]
    assert len(names) == len(set(names))
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert "lm_head.weight" in names
    total = sum(weight.count for _, weight in named_weights(decoder(block, block)))
    assert total == parameter_counts(decoder(block, block))["total"]


def test_a_vision_tower_is_one_component() -> None:
    block = Block(mixer=ATTENTION, ffn=MLP, norm=RMS)
    tower = Tower(name="vision.layers", role="vision", hidden=HIDDEN, blocks=(block, block))
    counts = parameter_counts(replace(decoder(block), towers=(tower,)))
    assert counts["vision_or_audio"] == 2 * count(block_weights(block, HIDDEN))
    assert counts["attention"] == parameter_counts(decoder(block))["attention"]

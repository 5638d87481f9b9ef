"""`planner.memory.kv_cache` and `kv_pages`: exact bytes for every kind of mixer, and the inverses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import UnknownName
from planner.memory.kv_cache import (
    UNBOUNDED,
    affine_kv_bytes,
    cache_layers,
    kv_bytes,
    kv_bytes_per_token,
    largest_that_fits,
    longest_context,
    most_sequences,
    sequence_bytes,
    vector_bytes,
)
from planner.memory.kv_pages import page_plan
from planner.model.shape import (
    Attention,
    Block,
    GatedDeltaNet,
    LatentAttention,
    Mamba1,
    Mamba2,
    Mixer,
    Mlp,
    ModelShape,
    Tower,
)
from planner.readers.models import load_model

GIB = 2**30
FFN = Mlp(width=64, gated=True, activation="silu")
GROUPED = Attention(heads=32, kv_heads=8, head_dim=128)


def model(*mixers: Mixer, cross: Attention | None = None, towers: tuple[Tower, ...] = ()) -> ModelShape:
    blocks = tuple(Block(mixer=mixer, ffn=FFN, cross=cross) for mixer in mixers)
    return ModelShape(
        name="m", model_type="m", hidden=64, blocks=blocks, embedding=None, head=None, towers=towers, max_positions=4096
    )


def one_layer(mixer: Mixer, context: int, **options: int) -> int:
    return kv_bytes(model(mixer), context, **options)


def test_grouped_attention_and_its_formats() -> None:
    assert one_layer(GROUPED, 10) == 10 * 8 * (128 + 128) * 2
    shape = model(GROUPED)
    per_head = {"auto": 512, "bf16": 512, "fp16": 512, "fp32": 1024, "fp8": 256, "int8": 264, "int4": 136}
    per_head |= {"q8_0": 272, "q5_1": 192, "q4_0": 144}
    assert {name: kv_bytes_per_token(shape, name) // 8 for name in per_head} == per_head


def test_heads_are_replicated_above_their_number() -> None:
    shape = model(GROUPED)
    assert [kv_bytes_per_token(shape, tensor=tp) // 512 for tp in (1, 2, 4, 8, 16, 32)] == [8, 4, 2, 1, 1, 1]
    multi_query = replace(GROUPED, kv_heads=1)
    assert kv_bytes_per_token(model(multi_query), tensor=8) == 512
    assert kv_bytes_per_token(model(replace(GROUPED, kv_heads=6)), tensor=4) == 2 * 512, "heads do not split"


def test_keys_and_values_of_unequal_size() -> None:
    assert one_layer(Attention(heads=4, kv_heads=4, head_dim=192, value_dim=128), 1) == 4 * (192 + 128) * 2


def test_the_latent_is_whole_on_every_rank() -> None:
    latent = LatentAttention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert [kv_bytes_per_token(model(latent), tensor=tp) for tp in (1, 8)] == [1152, 1152]
    indexed = replace(latent, index_heads=64, index_dim=128, index_top_k=2048)
    assert kv_bytes_per_token(model(indexed)) == 1152 + 128 + 4


def test_windows_and_chunks_stop_growing() -> None:
    cell = 8 * 512
    window = replace(GROUPED, window=1024)
    chunk = replace(GROUPED, chunk=512)
    assert [one_layer(window, n) for n in (1, 1024, 5000)] == [cell, 1024 * cell, 1024 * cell]
    assert [one_layer(chunk, n) for n in (511, 512, 513)] == [511 * cell, 512 * cell, 512 * cell]
    assert affine_kv_bytes(model(window, GROUPED)) == (cell, 1024 * cell)
    kept = cache_layers(model(window), windows=False)
    assert sequence_bytes(kept, 5000) == 5000 * cell


def test_what_keeps_nothing() -> None:
    assert one_layer(replace(GROUPED, causal=False), 100) == 0
    assert one_layer(replace(GROUPED, shares_kv=True), 100) == 0
    assert kv_bytes(model(GROUPED, replace(GROUPED, shares_kv=True)), 100) == one_layer(GROUPED, 100)


def test_cross_attention_is_as_long_as_the_encoder() -> None:
    cross = replace(GROUPED, cross=True, causal=False)
    fixed = model(GROUPED, cross=cross, towers=(Tower(name="e", role="encoder", hidden=64, blocks=(), tokens=1500),))
    assert [kv_bytes(fixed, n) - one_layer(GROUPED, n) for n in (1, 99)] == [1500 * 4096, 1500 * 4096]
    open_ended = model(GROUPED, cross=cross)
    assert kv_bytes(open_ended, 7) == 2 * one_layer(GROUPED, 7)
    given = cache_layers(open_ended, encoder_tokens=50)
    assert sequence_bytes(given, 7) == one_layer(GROUPED, 7) + 50 * 4096


def test_recurrent_states_do_not_depend_on_the_context() -> None:
    mamba1 = Mamba1(inner=256, state=16, conv=4, dt_rank=8)
    assert one_layer(mamba1, 1) == one_layer(mamba1, 9999) == 256 * 16 * 4 + 256 * 3 * 2
    assert kv_bytes(model(mamba1), 1, tensor=2) == 128 * 16 * 4 + 128 * 3 * 2
    mamba2 = Mamba2(inner=256, heads=8, head_dim=32, state=64, groups=2, conv=4)
    assert one_layer(mamba2, 5) == 8 * 32 * 64 * 4 + (256 + 2 * 2 * 64) * 3 * 2
    assert kv_bytes(model(mamba2), 5, tensor=4) == 2 * 32 * 64 * 4 + (64 + 2 * 1 * 64) * 3 * 2
    # 61.4 MiB a sequence in the 30 layers of Qwen3.5-35B-A3B: 32 value heads x 128 x 128 in fp32, and a convolution
    delta = GatedDeltaNet(key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv=4)
    assert one_layer(delta, 5) == 2_097_152 + 49_152
    assert sequence_bytes(cache_layers(model(delta), convolution="fp32"), 5) == 2_097_152 + 2 * 49_152


def test_blocks_round_positions_up() -> None:
    assert one_layer(GROUPED, 17, block_size=16) == 32 * 4096
    assert one_layer(GROUPED, 32, block_size=16) == 32 * 4096
    assert one_layer(replace(GROUPED, window=20), 500, block_size=16) == 32 * 4096


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match='did you mean "q8_0"'):
        vector_bytes("q8_1", 128)


def test_inverses() -> None:
    shape = model(GROUPED, GROUPED)
    assert longest_context(shape, 100 * 8192 + 5) == 100
    assert longest_context(shape, 100 * 8192, sequences=3) == 33
    assert longest_context(shape, 100 * 8192, block_size=16) == 96
    assert most_sequences(shape, 100 * 8192, 7) == 14
    assert longest_context(shape, 10) == 0 and most_sequences(shape, 10, 7) == 0
    endless = model(Mamba1(inner=256, state=16, conv=4, dt_rank=8))
    assert longest_context(endless, GIB) == UNBOUNDED
    assert longest_context(endless, 10) == 0
    assert most_sequences(model(replace(GROUPED, causal=False)), 10, 7, most=5) == 5


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 6, 7, 8, 1000])
def test_bisection_finds_every_edge(limit: int) -> None:
    assert largest_that_fits(lambda n: n, limit, most=7) == min(limit, 7)


# bytes a token: (model, format, tensor, bytes)
PER_TOKEN = [
    ("Llama-3.1-8B", "bf16", 1, 131_072),
    ("Llama-3.1-8B", "fp8", 1, 65_536),
    ("Llama-3.1-70B", "bf16", 4, 81_920),
    ("Llama-3.1-70B", "fp8", 4, 40_960),
    ("Qwen3-30B-A3B", "bf16", 1, 98_304),
    ("DeepSeek-V3", "bf16", 1, 70_272),
    ("DeepSeek-V3", "bf16", 8, 70_272),
    ("DeepSeek-V3", "fp8", 1, 35_136),
    ("Qwen3-Next-80B-A3B-Instruct", "bf16", 1, 24_576),
    ("Mistral-7B-v0.1", "bf16", 1, 131_072),
    ("Llama-2-7b-hf", "fp16", 1, 524_288),
]


@pytest.mark.parametrize(("name", "dtype", "tensor", "expected"), PER_TOKEN)
def test_bytes_per_token_of_known_models(name: str, dtype: str, tensor: int, expected: int) -> None:
    assert kv_bytes_per_token(load_model(name), dtype, tensor) == expected


def test_hybrids_at_long_context() -> None:
    gemma = load_model("gemma-3-27b-it")
    assert round(kv_bytes(gemma, 131_072) / GIB, 2) == 10.41
    assert affine_kv_bytes(gemma) == (10 * 8192, 52 * 1024 * 8192)
    assert kv_bytes(load_model("Mistral-7B-v0.1"), 32_768) == GIB // 2
    deep = load_model("DeepSeek-V3")
    assert round(kv_bytes(deep, 131_072) / GIB, 3) == 8.578
    assert kv_bytes(deep, 32_768, "q8_0") == int(1166.625 * 2**20), "ik_llama.cpp pull 259 prints 1166.62 MiB"
    hybrid = load_model("Qwen3.5-27B")
    slope, fixed = affine_kv_bytes(hybrid)
    assert slope * 131_072 == 8 * GIB and round(fixed / GIB, 2) == 0.14


def test_pages_of_one_kind_are_blocks() -> None:
    plan = page_plan(cache_layers(load_model("Llama-3.1-8B")), 16, 2048)
    assert plan.page_bytes == 16 * 131_072
    assert [plan.sequence_pages(n) for n in (1, 16, 17, 20_000)] == [1, 1, 2, 1250]


def test_pages_of_a_hybrid_depend_on_the_batch_in_flight() -> None:
    """10 global and 52 local layers: groups of 10, one global and six local ones, eight idle layers."""
    layers = cache_layers(load_model("gemma-3-27b-it"))
    found = {
        in_flight: round(page_plan(layers, 16, in_flight).sequence_bytes(131_072) / GIB, 2)
        for in_flight in (0, 2048, 8192)
    }
    assert found == {0: 10.48, 2048: 11.41, 8192: 14.23}
    assert page_plan(layers, 16, 8192).sequence_pages(131_072) == 8192 + 6 * 577


def test_pages_beside_a_recurrent_state() -> None:
    """An attention block grows to the state's 2,146,304 B: 2096 tokens in fp8; a state takes two pages."""
    plan = page_plan(cache_layers(load_model("Qwen3.5-35B-A3B"), "fp8"), 16, 16_384)
    assert plan.page_bytes == 10 * 2096 * 1024
    assert plan.sequence_pages(131_072) == 63 + 3 * 2


def test_pages_of_unequal_heads_have_unequal_tokens() -> None:
    wide, narrow = GROUPED, replace(GROUPED, kv_heads=4, window=64)
    plan = page_plan(cache_layers(model(wide, narrow)), 16, 0)
    assert {group.layers.kind: group.block_tokens for group in plan.groups} == {"full": 16, "window": 32}
    assert page_plan((), 16, 0).sequence_bytes(100) == 0

"""Laws of serving memory: affine and monotone caches, exact inverses, sharding that conserves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.hardware import Device
from planner.memory.kv_cache import (
    KV_CACHE_FORMATS,
    affine_kv_bytes,
    cache_layers,
    kv_bytes,
    kv_bytes_per_token,
    longest_context,
    most_sequences,
)
from planner.memory.kv_pages import page_plan
from planner.memory.serving import ServingMemory, serving_memory
from planner.memory.serving_weights import serving_weight_bytes
from planner.model.shape import (
    Attention,
    Block,
    Embedding,
    GatedDeltaNet,
    Head,
    LatentAttention,
    Mamba1,
    Mamba2,
    Mixer,
    Mlp,
    ModelShape,
    Norm,
)
from planner.plan import Requests, ServingParallelism, ServingPlan
from planner.quantization import QUANTIZATIONS

GIB = 2**30
NORM = Norm(kind="rmsnorm")
ENGINES = st.sampled_from(["ideal", "vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm"])

attentions = st.builds(
    Attention,
    heads=st.just(16),
    kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
    head_dim=st.sampled_from([32, 64, 128]),
    window=st.sampled_from([None, None, 128, 1000]),
    chunk=st.sampled_from([None, 512]),
    shares_kv=st.booleans(),
)
latents = st.builds(
    LatentAttention,
    heads=st.just(16),
    q_rank=st.sampled_from([None, 64]),
    kv_rank=st.sampled_from([64, 512]),
    nope_dim=st.just(64),
    rope_dim=st.just(32),
    value_dim=st.just(64),
)
recurrent = st.one_of(
    st.builds(Mamba1, inner=st.just(512), state=st.just(16), conv=st.just(4), dt_rank=st.just(16)),
    st.builds(
        Mamba2,
        inner=st.just(512),
        heads=st.just(16),
        head_dim=st.just(32),
        state=st.just(64),
        groups=st.just(2),
        conv=st.just(4),
    ),
    st.builds(
        GatedDeltaNet,
        key_heads=st.just(16),
        value_heads=st.just(16),
        key_dim=st.just(32),
        value_dim=st.just(32),
        conv=st.just(4),
    ),
)
mixers: st.SearchStrategy[Mixer] = st.one_of(attentions, latents, recurrent)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kinds = draw(st.lists(mixers, min_size=1, max_size=3))
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))
    ffn = Mlp(width=1024, gated=True, activation="silu")
    return ModelShape(
        name="drawn",
        model_type="drawn",
        hidden=512,
        blocks=tuple(Block(mixer=mixer, ffn=ffn, norm=NORM) for mixer in layers),
        embedding=Embedding(rows=1024, size=512),
        head=Head(rows=1024, tied=draw(st.booleans()), norm=NORM),
        max_positions=4096,
    )


formats = st.sampled_from(KV_CACHE_FORMATS)
contexts = st.integers(1, 50_000)


def card(gib: int) -> Device:
    return Device(
        name="card", title="card", vendor="m", form_factor="f", architecture="a", memory_type="HBM",
        torch_total_memory_bytes=gib * GIB,
    )  # fmt: skip


@given(shapes(), contexts, contexts, formats, st.sampled_from([1, 16, 64]))
def test_a_cache_never_shrinks_with_its_context(
    shape: ModelShape, first: int, second: int, dtype: str, block: int
) -> None:
    low, high = sorted((first, second))
    assert kv_bytes(shape, low, dtype, block) <= kv_bytes(shape, high, dtype, block)
    assert kv_bytes(shape, low, dtype) <= kv_bytes(shape, low, dtype, block)


@given(shapes(), st.integers(1001, 10**6), formats, st.sampled_from([1, 2, 4]))
def test_a_cache_is_affine_beyond_its_windows(shape: ModelShape, context: int, dtype: str, tensor: int) -> None:
    slope, fixed = affine_kv_bytes(shape, dtype, tensor)
    assert kv_bytes(shape, context, dtype, tensor=tensor) == slope * context + fixed
    assert slope <= kv_bytes_per_token(shape, dtype, tensor)


@given(shapes(), contexts, formats)
def test_more_ranks_never_hold_more_each_nor_less_together(shape: ModelShape, context: int, dtype: str) -> None:
    held = [kv_bytes(shape, context, dtype, tensor=tensor) for tensor in (1, 2, 4, 8, 16, 32)]
    assert held == sorted(held, reverse=True)
    for ranks, each in zip((1, 2, 4, 8, 16, 32), held, strict=True):
        assert ranks * each >= held[0]


@given(shapes(), st.integers(0, GIB), st.integers(1, 64), formats, st.sampled_from([1, 16]))
def test_the_longest_context_is_an_edge(
    shape: ModelShape, available: int, sequences: int, dtype: str, block: int
) -> None:
    most = 10**6
    longest = longest_context(shape, available, sequences=sequences, dtype=dtype, block_size=block, most=most)
    if longest:
        assert sequences * kv_bytes(shape, longest, dtype, block) <= available
    if longest < most:
        assert sequences * kv_bytes(shape, longest + 1, dtype, block) > available


@given(shapes(), st.integers(0, GIB), contexts, formats)
def test_the_most_sequences_are_an_edge(shape: ModelShape, available: int, context: int, dtype: str) -> None:
    found = most_sequences(shape, available, context, dtype=dtype, most=10**9)
    one = kv_bytes(shape, context, dtype)
    assert found * one <= available
    if found < 10**9:
        assert (found + 1) * one > available


@given(shapes(), contexts, contexts, st.integers(0, 4096))
def test_pages_hold_what_the_cache_needs(shape: ModelShape, first: int, second: int, in_flight: int) -> None:
    layers = cache_layers(shape)
    plan = page_plan(layers, 16, in_flight)
    low, high = sorted((first, second))
    assert plan.sequence_bytes(low) <= plan.sequence_bytes(high)
    if not any(group.kind == "window" for group in layers):
        assert plan.sequence_bytes(high) >= kv_bytes(shape, high)
    else:  # a window of W keeps W - 1 tokens between steps
        assert plan.sequence_bytes(high) >= kv_bytes(shape, high) - kv_bytes_per_token(shape)


@given(shapes(), st.sampled_from(QUANTIZATIONS), st.sampled_from([2, 4, 8]))
def test_weights_on_ranks(shape: ModelShape, quantization: str, tensor: int) -> None:
    whole = serving_weight_bytes(shape, quantization)
    each = serving_weight_bytes(shape, quantization, tensor=tensor)
    assert each <= whole
    if quantization in ("none", "F32", "F16", "BF16"):
        assert tensor * each >= whole


@settings(max_examples=60)
@given(shapes(), st.integers(2, 40_000), st.integers(1, 300), ENGINES, st.sampled_from([8, 24, 80]))
def test_answers_agree_with_themselves(
    shape: ModelShape, context: int, concurrency: int, engine: str, gib: int
) -> None:
    requests = Requests(context_length=context, prompt_tokens=1, output_tokens=1, concurrency=concurrency)
    plan = ServingPlan(model="drawn", engine=engine, requests=requests)  # pyright: ignore[reportArgumentType]
    found = serving_memory(plan, shape, card(gib))
    assert sum(found.breakdown.values()) == found.device_used
    most, longest = found.max_concurrent_sequences, found.longest_context_by_memory
    assert found.fits == (most is None or concurrency <= most)
    if found.kv_cache:
        assert found.fits == (longest is None or context <= longest)


@settings(max_examples=60)
@given(shapes(), st.integers(2, 4000), st.integers(1, 50), ENGINES)
def test_more_load_needs_more_cache(shape: ModelShape, context: int, concurrency: int, engine: str) -> None:
    def cache(length: int, count: int) -> int:
        requests = Requests(context_length=length, prompt_tokens=1, output_tokens=1, concurrency=count)
        plan = ServingPlan(model="drawn", engine=engine, requests=requests)  # pyright: ignore[reportArgumentType]
        return serving_memory(plan, shape, card(80)).kv_cache

    base = cache(context, concurrency)
    assert base <= cache(context + 500, concurrency)
    assert base <= cache(context, concurrency + 1)


@settings(max_examples=40)
@given(shapes(), st.integers(1, 40), st.sampled_from([2, 3, 4]))
def test_replicas_divide_the_load_and_nothing_else(shape: ModelShape, each: int, data: int) -> None:
    def answer(count: int, replicas: int) -> ServingMemory:
        requests = Requests(context_length=300, prompt_tokens=1, output_tokens=1, concurrency=count)
        degrees = ServingParallelism(data=replicas)
        return serving_memory(ServingPlan(model="drawn", requests=requests, parallelism=degrees), shape, card(80))

    one, many = answer(each, 1), answer(each * data, data)
    assert many.breakdown == one.breakdown
    assert many.kv_token_capacity == data * one.kv_token_capacity

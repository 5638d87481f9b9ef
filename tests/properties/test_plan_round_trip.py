"""Writing a plan and reading it back gives the same plan, whatever the format."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.plan import ServingPlan, TrainingPlan
from planner.readers.plan_document import defaults_used, plan_from_mapping, plan_from_text
from planner.writers.plan_document import plan_to_json, plan_to_mapping, plan_to_yaml

SIZES = st.sampled_from([1, 2, 4, 8])
FORMATS = st.sampled_from(["fp32", "bf16", "fp16"])
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30)
MODELS = st.one_of(
    st.sampled_from(["gpt2", "meta-llama/Llama-3.1-8B", "./folder/config.json", "yes", "1e9", "~", "- a", "a: b"]),
    NAMES,
    st.dictionaries(
        NAMES,
        st.recursive(
            st.one_of(
                st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(max_size=8)
            ),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
            max_leaves=6,
        ),
        min_size=1,
        max_size=5,
    ),
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings that hold any of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


PRECISIONS = st.one_of(
    st.sampled_from(["fp32", "bf16", "fp16", "bf16-amp", "fp16-amp", "bf16-mixed", "fp16-mixed", "fp8-mixed"]),
    some(weights=FORMATS, gradients=FORMATS, master_weights=st.none() | FORMATS, optimizer_states=FORMATS),
    some(recipe=st.just("bf16-mixed"), gradients=FORMATS, optimizer_states=st.sampled_from(["fp32", "int8"])),
)
OPTIMIZERS = st.one_of(
    st.sampled_from(["sgd", "adamw", "lion", "adamw-8bit", "lomo", "muon"]),
    some(implementation=st.sampled_from(["foreach", "fused", "for-loop"]), set_to_none=st.booleans()),
    st.fixed_dictionaries({"name": st.just("galore"), "rank": SIZES}),
    st.fixed_dictionaries({"name": st.just("adam"), "amsgrad": st.booleans()}),
)
METHODS = st.one_of(
    st.sampled_from(["full", "lora", "qlora", "ia3", "prefix", "prompt", "adapter", "frozen"]),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["lora", "qlora"])},
        optional={
            "rank": SIZES,
            "targets": st.lists(NAMES, unique=True, max_size=3) | st.just("all-linear"),
            "dropout": st.floats(0, 0.9),
            "dora": st.booleans(),
            "adapter_dtype": FORMATS,
        },
    ),
    st.fixed_dictionaries({"name": st.just("frozen"), "trainable_layers": st.integers(0, 9)}),
)
HARDWARE = some(
    gpu=NAMES, gpus_per_node=SIZES, nodes=SIZES, price_per_gpu_hour=st.floats(0, 100) | st.none() | st.integers(0, 9)
)
TRAINING = st.fixed_dictionaries(
    {"model": MODELS},
    optional={
        "data": some(
            sequence_length=st.integers(1, 64).map(lambda number: number * 64),
            micro_batch_size=SIZES,
            gradient_accumulation_steps=SIZES,
            tokens=st.integers(1, 10**15) | st.just("15T"),
        ),
        "precision": PRECISIONS,
        "optimizer": OPTIMIZERS,
        "method": METHODS,
        "recompute": st.sampled_from(["none", "full", "selective", "sqrt"]) | some(every=SIZES),
        "attention": st.sampled_from(["eager", "sdpa", "flash", "flash_attention_2"]),
        "loss": st.sampled_from(["default", "chunked", "fused", "liger", "cce"]),
        "implementation": st.sampled_from(["transformers", "megatron", "compiled"]) | some(version=NAMES),
        "parallelism": some(
            data=SIZES, tensor=SIZES, pipeline=SIZES, context=SIZES, expert=SIZES, zero=st.integers(0, 3),
            sequence_parallel=st.booleans(), virtual_stages=SIZES, bucket_bytes=st.just("25 MiB"),
        ),
        "offload": st.lists(st.sampled_from(["optimizer", "parameters", "activations"]), unique=True) | st.just("none"),
        "hardware": HARDWARE | NAMES,
    },
)  # fmt: skip
SERVING = st.fixed_dictionaries(
    {"kind": st.just("serving"), "model": MODELS},
    optional={
        "quantization": st.sampled_from(["none", "fp8", "gptq", "q4_k_m", "IQ2_XXS"]),
        "kv_cache": some(dtype=st.sampled_from(["auto", "fp8", "q8_0"]), block_size=SIZES),
        "requests": some(
            context_length=st.integers(2, 9000), prompt_tokens=SIZES, output_tokens=SIZES, concurrency=SIZES
        ),
        "engine": st.sampled_from(["ideal", "vllm", "sglang", "llama.cpp"]),
        "parallelism": some(tensor=SIZES, pipeline=SIZES, expert=SIZES, data=SIZES),
        "hardware": some(gpu=NAMES, gpus_per_node=SIZES, nodes=SIZES, memory_utilization=st.floats(0.05, 1)),
    },
)


@st.composite
def plans(draw: st.DrawFn, documents: st.SearchStrategy[dict[str, Any]]) -> TrainingPlan | ServingPlan:
    """Plans of those documents that contradict nothing."""
    try:
        return plan_from_mapping(draw(documents))
    except PlannerError:
        # A contradiction between drawn fields: keep the draw, without the sections that contradict.
        document = draw(documents)
        kept = {name: document[name] for name in ("kind", "model", "attention", "quantization") if name in document}
        return plan_from_mapping(kept)


ALL_PLANS = plans(TRAINING) | plans(SERVING)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(ALL_PLANS)
def test_mapping(plan: TrainingPlan | ServingPlan) -> None:
    assert plan_from_mapping(plan_to_mapping(plan)) == plan


@quick
@given(ALL_PLANS)
def test_mapping_with_defaults(plan: TrainingPlan | ServingPlan) -> None:
    assert plan_from_mapping(plan_to_mapping(plan, defaults=True)) == plan


@quick
@given(ALL_PLANS)
def test_json(plan: TrainingPlan | ServingPlan) -> None:
    assert plan_from_text(plan_to_json(plan)) == plan


@quick
@given(ALL_PLANS)
def test_yaml(plan: TrainingPlan | ServingPlan) -> None:
    assert plan_from_text(plan_to_yaml(plan)) == plan


@quick
@given(ALL_PLANS)
def test_written_documents_are_canonical(plan: TrainingPlan | ServingPlan) -> None:
    once = plan_to_mapping(plan)
    assert plan_to_mapping(plan_from_mapping(once)) == once


@quick
@given(ALL_PLANS)
def test_nothing_is_left_to_a_default_when_all_is_written(plan: TrainingPlan | ServingPlan) -> None:
    assert defaults_used(plan_to_mapping(plan, defaults=True)) == []


SECTIONS = ["model", "data", "kind", "hardware", "precision", "optimizer", "method", "recompute", "offload", "requests"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(SECTIONS), inner)
)


@quick
@given(ANYTHING)
def test_any_document_is_read_or_refused_in_one_sentence(document: Any) -> None:
    try:
        plan_from_mapping(document)
    except PlannerError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300


@quick
@given(st.text())
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    try:
        plan_from_text(text)
    except PlannerError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300


@pytest.mark.parametrize("documents", [TRAINING, SERVING])
def test_drawn_documents_mostly_hold(documents: st.SearchStrategy[dict[str, Any]]) -> None:
    """The strategies above must not draw contradictions alone, or the laws would be about tiny plans."""
    held = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(documents)
    def count(document: dict[str, Any]) -> None:
        try:
            plan_from_mapping(document)
            held.append(True)
        except PlannerError:
            held.append(False)

    count()
    assert sum(held) > len(held) / 5

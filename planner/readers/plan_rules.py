"""Rules between the fields of a plan: what must divide what, what excludes what, what belongs to which kind.

Each rule is a function of the plan's values and of the dotted names that the document gave; it returns the sentence to
raise, or None. Rules speak about what the tools themselves refuse or silently ignore; each says who in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from math import prod

from planner.plan import ServingPlan, TrainingPlan
from planner.quantization import GGUF_FILE_TYPES

__all__ = ["METHOD_FIELDS", "contradiction_in"]

_ADAPTERS = frozenset({"lora", "qlora"})

# Which methods read a field of `method`; `name` is read by all.
METHOD_FIELDS: Mapping[str, AbstractSet[str]] = {
    "rank": _ADAPTERS,
    "targets": _ADAPTERS | {"ia3"},
    "dropout": _ADAPTERS | {"adapter"},
    "dora": _ADAPTERS,
    "adapter_dtype": _ADAPTERS | {"ia3", "prefix", "prompt", "adapter"},
    "quantization": {"qlora"},
    "double_quantization": {"qlora"},
    "quantizes_head": {"qlora"},
    "upcast": {"qlora"},
    "upcast_embeddings": {"qlora"},
    "virtual_tokens": {"prefix", "prompt"},
    "bottleneck": {"adapter"},
    "trainable_layers": {"frozen"},
    "train_embeddings": _ADAPTERS | {"frozen"},
}

# torch.optim classes with a `fused` flag.
_FUSED = frozenset({"sgd", "sgd-momentum", "adam", "adamw"})

TrainingRule = Callable[[TrainingPlan, AbstractSet[str]], str | None]
ServingRule = Callable[[ServingPlan, AbstractSet[str]], str | None]


def _accelerators(plan: TrainingPlan | ServingPlan) -> int:
    return plan.hardware.gpus_per_node * plan.hardware.nodes


def _product_text(degrees: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items())


def _degrees_fill_the_accelerators(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """A launch with idle or missing ranks does not start (torchrun's world size is the product of the mesh)."""
    degrees = plan.parallelism
    others = {"tensor": degrees.tensor, "pipeline": degrees.pipeline, "context": degrees.context}
    gpus = _accelerators(plan)
    if degrees.data is None:
        if gpus % prod(others.values()):
            return (
                f"{gpus} accelerators cannot be divided into groups of {_product_text(others)}; "
                "change a degree or hardware."
            )
        return None
    named = {"data": degrees.data, **others}
    if prod(named.values()) != gpus:
        size = f"gpus_per_node {plan.hardware.gpus_per_node} x nodes {plan.hardware.nodes}"
        return (
            f"parallelism needs {_product_text(named)} = {prod(named.values())} accelerators, "
            f"but hardware has {size} = {gpus}."
        )
    return None


def _one_batch_rule(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """The two say the same thing twice."""
    if plan.data.global_batch_size is not None and plan.data.gradient_accumulation_steps is not None:
        return (
            "Both data.global_batch_size and data.gradient_accumulation_steps are given; give one, the other follows."
        )
    return None


def _whole_accumulation(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Every rank runs the same number of micro batches (Megatron and DeepSpeed assert it)."""
    batch, micro, data = plan.data.global_batch_size, plan.data.micro_batch_size, plan.data_ranks
    if batch is not None and batch % (micro * data):
        return (
            f"data.global_batch_size {batch} is not a multiple of "
            f"micro_batch_size {micro} x {data} data-parallel ranks."
        )
    return None


def _even_sequence(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Context and sequence parallelism cut the sequence into equal parts."""
    degrees, length = plan.parallelism, plan.data.sequence_length
    cut = degrees.context * (degrees.tensor if degrees.sequence_parallel else 1)
    if length % cut:
        return (
            f"data.sequence_length {length} cannot be cut into {cut} equal parts for context and sequence parallelism."
        )
    return None


def _experts_over_whole_groups(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Expert groups are carved out of the ranks of one pipeline stage (Megatron-Core's parallel_state)."""
    degrees = plan.parallelism
    ranks = plan.data_ranks * degrees.context * degrees.tensor
    if ranks % degrees.expert:
        return (
            f"parallelism.expert {degrees.expert} does not divide the "
            f"{ranks} ranks (data x context x tensor) of a stage."
        )
    return None


def _replicas_divide_data(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Hybrid sharding is a two-dimensional mesh, replicas x shards."""
    replicas, data = plan.parallelism.replicas, plan.data_ranks
    if data % replicas:
        return f"parallelism.replicas {replicas} does not divide the {data} data-parallel ranks."
    if replicas > 1 and plan.parallelism.zero == 0:
        return f"parallelism.replicas {replicas} needs something sharded between the replicas; set zero to 1, 2 or 3."
    return None


def _engine_and_zero(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """DDP replicates; FSDP shards parameters (3) or gathers them once a step (2)."""
    engine, zero = plan.parallelism.engine, plan.parallelism.zero
    if engine == "ddp" and zero > 0:
        return f"parallelism.engine ddp replicates everything, but zero is {zero}; use deepspeed, fsdp2 or zero: 0."
    if engine in ("fsdp1", "fsdp2") and zero < 2:
        return (
            f"parallelism.engine {engine} shards parameters, but zero is {zero}; "
            "set zero to 3, or 2 to keep them gathered."
        )
    return None


def _pipeline_and_zero(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """DeepSpeed's PipelineEngine asserts ZeRO stage < 2; `auto` at stage 2 is DeepSpeed."""
    degrees = plan.parallelism
    deepspeed = degrees.engine == "deepspeed" or (degrees.engine == "auto" and degrees.zero == 2)
    if deepspeed and degrees.zero >= 2 and degrees.pipeline > 1:
        return (
            f"DeepSpeed does not combine zero {degrees.zero} with pipeline {degrees.pipeline}; "
            "use zero 1, or engine fsdp2 with zero 3."
        )
    return None


def _stages_and_schedule(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """1F1B and GPipe hold one model chunk a rank; interleaving needs several, and more than one rank."""
    degrees = plan.parallelism
    if degrees.virtual_stages > 1 and degrees.pipeline == 1:
        return f"parallelism.virtual_stages {degrees.virtual_stages} needs pipeline above 1."
    if degrees.virtual_stages > 1 and degrees.schedule in ("1f1b", "gpipe"):
        return (
            f"parallelism.schedule {degrees.schedule} has one stage a rank, "
            f"but virtual_stages is {degrees.virtual_stages}; use interleaved."
        )
    if degrees.schedule == "interleaved" and degrees.virtual_stages == 1:
        return "parallelism.schedule interleaved needs virtual_stages of 2 or more."
    return None


def _method_reads_its_fields(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """A rank given to full fine-tuning would be ignored in silence."""
    for name, readers in METHOD_FIELDS.items():
        if f"method.{name}" in given and plan.method.name not in readers:
            return (
                f"method.{name} is given, but method {plan.method.name} does not read it; "
                f"it belongs to {', '.join(sorted(readers))}."
            )
    return None


def _dropout_below_one(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Dropout of 1 drops everything."""
    return "method.dropout is 1; it takes a number below 1." if plan.method.dropout >= 1 else None


def _lora_variants(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """bitsandbytes unpacks 4-bit weights to a 16- or 32-bit format before the product; no fp8 kernel takes them."""
    if plan.method.name == "qlora" and plan.precision.compute == "fp8":
        return "method qlora computes in bf16, fp16 or fp32, but precision asks for fp8."
    return None


def _optimizer_flags(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Flags that the named optimizer does not have (torch.optim, and the papers of GaLore and LOMO)."""
    optimizer = plan.optimizer
    if "optimizer.rank" in given and optimizer.name != "galore":
        return f"optimizer.rank is the rank of galore's projection, but the optimizer is {optimizer.name}."
    if optimizer.amsgrad and optimizer.name not in ("adam", "adamw"):
        return f"optimizer.amsgrad belongs to adam and adamw, but the optimizer is {optimizer.name}."
    if optimizer.implementation == "fused" and optimizer.name not in _FUSED:
        return (
            f"optimizer.implementation fused exists for {', '.join(sorted(_FUSED))}, "
            f"but the optimizer is {optimizer.name}."
        )
    if optimizer.name == "lomo" and not optimizer.in_backward:
        return "optimizer lomo updates during the backward pass, but in_backward is false."
    return None


def _in_backward_without_accumulation(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """An update during backward frees the gradient that the next micro batch would add to."""
    if not plan.optimizer.in_backward:
        return None
    steps = plan.data.gradient_accumulation_steps
    if steps is None and plan.data.global_batch_size is not None:
        steps = plan.data.global_batch_size // (plan.data.micro_batch_size * plan.data_ranks)
    if steps is not None and steps > 1:
        return f"optimizer.in_backward frees each gradient at once, so it cannot accumulate over {steps} micro batches."
    return None


def _autocast_where_formats_differ(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Without a cast, torch computes in the format of the weights."""
    precision = plan.precision
    if (
        not precision.autocast
        and precision.compute in ("bf16", "fp16", "fp32")
        and precision.compute != precision.weights
    ):
        return (
            f"precision computes in {precision.compute} with {precision.weights} weights and no autocast; "
            "set autocast or one format."
        )
    return None


def _recompute_interval(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """`every` is the interval of mode every alone."""
    if "recompute.every" in given and plan.recompute.mode != "every":
        return (
            f"recompute.every is given, but recompute.mode is {plan.recompute.mode}; "
            f"write recompute: {{every: {plan.recompute.every}}}."
        )
    return None


def _no_serving_fields(plan: TrainingPlan, given: AbstractSet[str]) -> str | None:
    """Only serving engines claim a share of the device."""
    if plan.hardware.memory_utilization is not None:
        return "hardware.memory_utilization is a field of serving plans; this plan is of kind training."
    return None


_TRAINING_RULES: tuple[TrainingRule, ...] = (
    _no_serving_fields,
    _one_batch_rule,
    _degrees_fill_the_accelerators,
    _whole_accumulation,
    _even_sequence,
    _experts_over_whole_groups,
    _replicas_divide_data,
    _engine_and_zero,
    _pipeline_and_zero,
    _stages_and_schedule,
    _method_reads_its_fields,
    _dropout_below_one,
    _lora_variants,
    _optimizer_flags,
    _in_backward_without_accumulation,
    _autocast_where_formats_differ,
    _recompute_interval,
)


def _serving_degrees(plan: ServingPlan, given: AbstractSet[str]) -> str | None:
    """One process an accelerator: data x tensor x pipeline of them."""
    degrees = plan.parallelism
    named = {"data": degrees.data, "tensor": degrees.tensor, "pipeline": degrees.pipeline}
    gpus = _accelerators(plan)
    if prod(named.values()) != gpus:
        return (
            f"parallelism needs {_product_text(named)} = {prod(named.values())} accelerators, but hardware has {gpus}."
        )
    ranks = degrees.tensor * degrees.data
    if ranks % degrees.expert:
        return f"parallelism.expert {degrees.expert} does not divide the {ranks} ranks (data x tensor) of a stage."
    return None


def _requests_fit_the_context(plan: ServingPlan, given: AbstractSet[str]) -> str | None:
    """A sequence is its prompt and its output."""
    load = plan.requests
    if load.context_length is not None and load.prompt_tokens + load.output_tokens > load.context_length:
        return (
            f"requests need {load.prompt_tokens} prompt and {load.output_tokens} output tokens at least, "
            f"but context_length is {load.context_length}."
        )
    return None


def _gguf_runs_where(plan: ServingPlan, given: AbstractSet[str]) -> str | None:
    """GGUF files are llama.cpp's; vLLM, SGLang and transformers read them too, TensorRT-LLM does not."""
    if plan.engine == "tensorrt-llm" and plan.quantization in GGUF_FILE_TYPES:
        return f"tensorrt-llm does not read GGUF files such as {plan.quantization}; use llama.cpp or vllm."
    return None


_SERVING_RULES: tuple[ServingRule, ...] = (_serving_degrees, _requests_fit_the_context, _gguf_runs_where)


def contradiction_in(plan: TrainingPlan | ServingPlan, given: AbstractSet[str]) -> str | None:
    """The first rule that the plan breaks, as a sentence; None when it keeps them all."""
    if isinstance(plan, TrainingPlan):
        return next((sentence for rule in _TRAINING_RULES if (sentence := rule(plan, given))), None)
    return next((sentence for rule in _SERVING_RULES if (sentence := rule(plan, given))), None)

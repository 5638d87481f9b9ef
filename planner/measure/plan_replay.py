"""A training plan as the arguments of a dry run: the plan's real modules, optimizer and sharding engine.

What a plan asks for and PyTorch's own modules on this machine do not do is refused in one sentence; nothing is
replayed as something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import NotCovered, SourceUnavailable
from planner.hardware import software_device
from planner.ledger.profile import profile_named
from planner.memory.device import workspace_bytes
from planner.memory.sharding import engine_of
from planner.memory.training import accumulation_steps
from planner.model.adapter_targets import default_targets
from planner.model.catalogue import find_entry, hub_id
from planner.plan import TrainingPlan
from planner.readers.hardware_profiles import load_hardware, resolve_device
from planner.readers.hf_config import cached_config_path, config_from_path
from planner.readers.models import load_model

__all__ = ["config_of", "replay_arguments"]

_ATTENTIONS = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
_OPTIMIZERS = ("adam", "adamw", "sgd", "sgd-momentum", "adafactor", "muon")


def config_of(model: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a plan's model: given, in the catalogue, at a path, or in the local Hugging Face cache."""
    if isinstance(model, Mapping):
        return model
    entry = find_entry(model)
    if entry is not None:
        return entry.config
    path = Path(model).expanduser()
    if path.exists():
        return config_from_path(path)
    cached = cached_config_path(hub_id(model))
    if cached is None:
        raise SourceUnavailable(f'no configuration of "{model}" on this machine; `planner estimate --fetch` reads one.')
    return config_from_path(cached)


def replay_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """Keyword arguments of `replay_config` for a plan. Raises NotCovered for what cannot be replayed."""
    for reason in _obstacles(plan):
        raise NotCovered(f"the dry run does not replay {reason}")
    device = software_device(load_hardware(resolve_device(plan.hardware.gpu).name))
    settings: dict[str, Any] = {"amsgrad": True} if plan.optimizer.amsgrad else {}
    if plan.optimizer.name in ("adam", "adamw", "sgd", "sgd-momentum"):
        settings["fused" if plan.optimizer.implementation == "fused" else "foreach"] = (
            plan.optimizer.implementation != "for-loop"
        )
    sharding = _sharding(plan)
    casts_by_unit = sharding is not None and sharding["engine"] != "ddp"
    reentrant = profile_named(plan.implementation.name, plan.implementation.version).reentrant
    checkpointing = "reentrant" if reentrant else "non-reentrant"
    return {
        "micro_batch_size": plan.data.micro_batch_size,
        "sequence_length": plan.data.sequence_length,
        "dtype": plan.precision.weights,
        "autocast": plan.precision.compute if _casts(plan) and not casts_by_unit else None,
        "attention": _ATTENTIONS[plan.attention],
        "optimizer": plan.optimizer.name,
        "optimizer_kwargs": settings,
        "set_to_none": plan.optimizer.set_to_none,
        "accumulation_steps": accumulation_steps(plan),
        "gradient_checkpointing": checkpointing if plan.recompute.mode == "full" else False,
        "lora": _lora(plan) if plan.method.name == "lora" else None,
        "sharding": sharding,
        "workspace_bytes": workspace_bytes(device),
    }


def _casts(plan: TrainingPlan) -> bool:
    return plan.precision.compute != plan.precision.weights


def _lora(plan: TrainingPlan) -> dict[str, Any]:
    targets = plan.method.targets or default_targets(load_model(plan.model), plan.method)
    return {
        "r": plan.method.rank,
        "target_modules": "all-linear" if "all-linear" in targets else list(targets),
        "lora_dropout": plan.method.dropout,
        "use_dora": plan.method.dora,
    }


def _sharding(plan: TrainingPlan) -> dict[str, Any] | None:
    import torch

    engine, ranks = engine_of(plan.parallelism, plan.data_ranks), plan.data_ranks
    if ranks == 1 or engine == "none":
        return None
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    result: dict[str, Any] = {
        "engine": engine, "ranks": ranks, "reshard_after_forward": plan.parallelism.reshard_after_forward
    }  # fmt: skip
    if _casts(plan) and engine != "ddp":
        result["param_dtype"] = formats[plan.precision.compute]
        if engine == "fsdp2":
            result["reduce_dtype"] = formats[plan.precision.gradients]
    return result


def _obstacles(plan: TrainingPlan) -> Iterator[str]:
    """What stands in the way of a replay, each as the end of a sentence."""
    yield from _other_modules(plan)
    yield from _other_formats(plan)
    yield from _other_ranks(plan)
    if plan.method.name not in ("full", "lora"):
        yield f'method "{plan.method.name}": only full training and lora run on plain PyTorch modules.'
    if plan.method.name == "lora" and plan.method.adapter_dtype != "fp32" and plan.precision.weights != "fp32":
        yield f"adapters in {plan.method.adapter_dtype}: peft keeps them in fp32 beside 16-bit weights."
    if plan.recompute.mode not in ("none", "full"):
        yield f'recompute "{plan.recompute.mode}": transformers checkpoints every block or none.'
    if plan.optimizer.name not in _OPTIMIZERS:
        yield f'optimizer "{plan.optimizer.name}"; it does {", ".join(_OPTIMIZERS)}.'
    if plan.optimizer.in_backward:
        yield "an optimizer that steps during backward."
    if plan.offload:
        yield f"offload of {', '.join(plan.offload)}."


def _other_modules(plan: TrainingPlan) -> Iterator[str]:
    asked = plan.implementation
    if asked.name != "transformers" or asked.kernels or asked.compiled:
        kind = asked.kernels or ("compiled" if asked.compiled else asked.name)
        yield f"implementation {kind}: it runs plain transformers."
    elif asked.version is not None:
        import transformers

        here = ".".join(transformers.__version__.split(".")[:2])
        if profile_named("transformers", asked.version) != profile_named("transformers", here):
            yield f"transformers {asked.version}: the version installed here is {transformers.__version__}."
    if plan.loss != "default":
        yield f'loss "{plan.loss}": it runs the modules\' own.'


def _other_formats(plan: TrainingPlan) -> Iterator[str]:
    p = plan.precision
    if p.compute == "fp8":
        yield "fp8 products."
    if p.master_weights is not None or p.optimizer_states != p.weights:
        yield f"precision {p.recipe}: torch's optimizers keep no master weights and states in the weights' format."
    if p.gradients != p.weights:
        yield f"gradients in {p.gradients} beside weights in {p.weights}."
    if _casts(plan) and p.weights != "fp32":
        yield f"weights in {p.weights} computed in {p.compute}."


def _other_ranks(plan: TrainingPlan) -> Iterator[str]:
    p = plan.parallelism
    for name in ("tensor", "pipeline", "context", "expert"):
        if getattr(p, name) > 1:
            yield f"parallelism.{name} = {getattr(p, name)}: it traces one data-parallel rank."
    engine = engine_of(p, plan.data_ranks)
    if plan.data_ranks > 1 and (p.zero in (1, 2) or engine not in ("ddp", "fsdp1", "fsdp2")):
        yield f"parallelism.zero = {p.zero} with engine {engine}: it does ddp (zero 0), fsdp1 and fsdp2 (zero 3)."
    if p.replicas > 1 or p.prefetch != 1 or p.bucket_bytes is not None:
        yield "parallelism's replicas, prefetch and bucket_bytes other than the engines' defaults."

"""Short forms of a plan document and the mappings they stand for: `precision: bf16-mixed`, `optimizer: lomo`, ...

Documents in, documents out: each function returns a mapping whose keys are the fields of the section's dataclass.
Anything that is not a short form is passed on untouched, to be judged by `planner.readers.plan_fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRECISION_RECIPES", "SHORT_FORMS", "canonical", "expand_precision", "precision_fields"]

# Other tools' spellings of the values a plan accepts. An alias counts only where its meaning is accepted.
_ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp8-e4m3": "fp8",
    "fp8-e5m2": "fp8",
    "flash-attention": "flash",
    "flash-attention-2": "flash",
    "flash-attention-3": "flash",
    "flash-attn": "flash",
    "flash-attn-2": "flash",
    "liger-kernel": "liger",
    "cut-cross-entropy": "cce",
    "train": "training",
    "serve": "serving",
    "inference": "serving",
    "hf": "transformers",
    "huggingface": "transformers",
    "megatron-lm": "megatron",
    "megatron-core": "megatron",
    "llama-cpp": "llama.cpp",
    "llamacpp": "llama.cpp",
    "tensorrt": "tensorrt-llm",
    "trt-llm": "tensorrt-llm",
    "fsdp": "fsdp2",
    "gptq": "gptq-4bit",
    "awq": "awq-4bit",
    "adamw-torch": "adamw",
    "8bit-adamw": "adamw-8bit",
    "adamw-bnb-8bit": "adamw-8bit",
    "paged-adamw": "paged-adamw-8bit",
}


def canonical(given: str, accepted: Mapping[str, str]) -> str | None:
    """The accepted value that `given` spells, or None. `accepted` maps folded spellings to values.

    >>> canonical("Flash_Attention_2", {"sdpa": "sdpa", "flash": "flash"})
    'flash'
    """
    folded = given.strip().casefold().replace("_", "-")
    found = accepted.get(folded)
    if found is None and folded in _ALIASES:
        found = accepted.get(_ALIASES[folded])
    return found


def _recipe(weights: str, master_weights: str | None, states: str, compute: str, autocast: bool) -> dict[str, Any]:
    return {
        "weights": weights,
        "gradients": weights,  # a gradient is allocated in its parameter's format by torch.autograd
        "master_weights": master_weights,
        "optimizer_states": states,
        "compute": compute,
        "autocast": autocast,
    }


PRECISION_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "fp32": _recipe("fp32", None, "fp32", "fp32", False),
    "bf16": _recipe("bf16", None, "bf16", "bf16", False),
    "fp16": _recipe("fp16", None, "fp16", "fp16", False),
    "bf16-amp": _recipe("fp32", None, "fp32", "bf16", True),
    "fp16-amp": _recipe("fp32", None, "fp32", "fp16", True),
    "bf16-mixed": _recipe("bf16", "fp32", "fp32", "bf16", False),
    "fp16-mixed": _recipe("fp16", "fp32", "fp32", "fp16", False),
    "fp8-mixed": _recipe("bf16", "fp32", "fp32", "fp8", False),
}


def precision_fields(recipe: str, megatron: bool) -> dict[str, Any]:
    """The formats that a recipe stands for.

    Megatron accumulates and reduces gradients in fp32 whenever it trains in bf16 (`--bf16` switches
    `accumulate_allreduce_grads_in_fp32` on in megatron/training/arguments.py); with fp16 it does not.

    >>> precision_fields("bf16-mixed", megatron=True)["gradients"]
    'fp32'
    """
    fields = dict(PRECISION_RECIPES[recipe])
    if megatron and fields["master_weights"] == "fp32" and fields["weights"] == "bf16":
        fields["gradients"] = "fp32"
    return fields


_RECIPES_BY_FOLD = {name: name for name in PRECISION_RECIPES}
_FORMATS_BY_FOLD = {name: name for name in ("fp32", "bf16", "fp16")}


def expand_precision(given: Any, megatron: bool) -> Any:
    """`bf16-mixed` or a mapping of formats as a full mapping with its `recipe`.

    In a mapping, `recipe` names the base. Without it the base is the recipe named like the weights' format; then the
    states follow the copy of the weights that the optimizer updates, and 16-bit arithmetic on fp32 weights is autocast.
    """
    if isinstance(given, str):
        name = canonical(given, _RECIPES_BY_FOLD)
        return given if name is None else {"recipe": name, **precision_fields(name, megatron)}
    if not isinstance(given, Mapping):
        return given
    formats = {key: _format(value) for key, value in given.items()}
    if formats.get("master_weights") == "none":
        formats["master_weights"] = None
    recipe = formats.get("recipe")
    if recipe == "custom":
        return formats
    if recipe is not None:
        name = canonical(recipe, _RECIPES_BY_FOLD) if isinstance(recipe, str) else None
        if name is None:
            return formats
        base = precision_fields(name, megatron)
        expanded = base | formats
        return expanded | {"recipe": name if all(expanded[key] == base[key] for key in base) else "custom"}
    weights = formats.get("weights", "bf16")
    known = isinstance(weights, str) and weights in _FORMATS_BY_FOLD
    base = precision_fields(weights if known else "bf16", megatron)
    expanded = base | formats
    if "optimizer_states" not in formats and expanded["master_weights"] is not None:
        expanded["optimizer_states"] = expanded["master_weights"]
    if "autocast" not in formats:
        expanded["autocast"] = expanded["weights"] == "fp32" and expanded["compute"] in ("bf16", "fp16")
    same = (name for name in PRECISION_RECIPES if precision_fields(name, megatron) == expanded)
    return {"recipe": next(same, "custom"), **expanded}


def _format(given: Any) -> Any:
    """A number format in our spelling."""
    return canonical(given, _FORMATS_BY_FOLD) or given if isinstance(given, str) else given


def _named(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


def _optimizer(given: Any) -> Any:
    fields = _named(given)
    # LOMO is the update in backward; it has no other way to run.
    if isinstance(fields, Mapping) and "in_backward" not in fields and str(fields.get("name")).casefold() == "lomo":
        return {**fields, "in_backward": True}
    return fields


def _method(given: Any) -> Any:
    fields = _named(given)
    targets = fields.get("targets") if isinstance(fields, Mapping) else None
    if isinstance(targets, str):
        return {**fields, "targets": [part.strip() for part in targets.split(",")]}
    return fields


def _recompute(given: Any) -> Any:
    if isinstance(given, str):
        return {"mode": given}
    if isinstance(given, Mapping) and "every" in given and "mode" not in given:
        return {"mode": "every", **given}
    return given


def _implementation(given: Any) -> Any:
    fields = _named(given)
    name = fields.get("name") if isinstance(fields, Mapping) else None
    if isinstance(name, str) and name.casefold() == "compiled":
        return {**fields, "name": "transformers", "compiled": fields.get("compiled", True)}
    return fields


def _hardware(given: Any) -> Any:
    return {"gpu": given} if isinstance(given, str) else given


def _offload(given: Any) -> Any:
    if isinstance(given, str):
        return [] if given.casefold() == "none" else [part.strip() for part in given.split(",")]
    return [] if given == ["none"] else given


SHORT_FORMS = {
    "optimizer": _optimizer,
    "method": _method,
    "recompute": _recompute,
    "implementation": _implementation,
    "hardware": _hardware,
    "offload": _offload,
}

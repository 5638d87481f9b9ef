"""The inputs of a page: controls that are fields of a plan, and the plan document they make.

A control's key is its name in the address and stays as it is; the options are the plan's own words, so that a link, a
plan file and the command line say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from planner.errors import PlannerError
from planner.model.catalogue import model_names
from planner.quantization import QUANTIZATIONS
from planner.readers.hardware_profiles import device_names, load_hardware
from planner.readers.plan_fields import KV_CACHE_FORMATS, OPTIMIZERS
from planner.readers.plan_short_forms import PRECISION_RECIPES
from planner.units import format_bytes

__all__ = ["Inputs", "serving_inputs", "training_inputs", "unit_switch"]

_URL: Mapping[str, Any] = {"bind": "query-params"}
_ONE_OF: Mapping[str, Any] = {**_URL, "required": True}
_LONGEST_SEQUENCE = 2**24
_MOST = 2**16


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the controls hold: values by key, as in the address, and the plan document they stand for."""

    values: Mapping[str, Any]
    document: Mapping[str, Any]


def unit_switch() -> Any:
    """GiB (2^30 bytes) or GB (10^9 bytes), for every size on the page."""
    help = "1 GiB is 2^30 bytes, what nvidia-smi and PyTorch speak; 1 GB is 10^9 bytes."
    options = ["GiB", "GB"]
    return st.segmented_control(
        "Unit", options, default="GiB", key="unit", help=help, label_visibility="collapsed", **_ONE_OF
    )


def training_inputs(unit: Any) -> Inputs:
    """The controls of a training or fine-tuning plan on the current container; sizes are printed in `unit`."""
    values = _model_and_gpu(unit)
    values["method"] = st.segmented_control(
        "Method",
        ["full", "lora", "qlora"],
        default="qlora",
        key="method",
        help="full trains every weight; lora trains small adapters; qlora does so over a base packed in 4 bits.",
        **_ONE_OF,
    )
    left, right = st.columns(2, wrap=False)
    with left:
        values["seq"] = _number("Sequence length", "seq", 2048, _LONGEST_SEQUENCE, "Tokens of one packed sequence.")
    with right:
        values["batch"] = _number("Micro batch", "batch", 1, _MOST, "Sequences in one forward pass of a GPU.")
    values["recompute"] = st.segmented_control(
        "Recompute activations",
        ["none", "selective", "full"],
        default="full",
        key="recompute",
        help="Gradient checkpointing: full keeps only each block's input and runs its forward pass a second time.",
        **_ONE_OF,
    )
    with st.expander("Precision, optimizer, adapters, GPUs"):
        values |= _finer_inputs(adapted=values["method"] != "full")
    return Inputs(values, _document(values))


def serving_inputs(unit: Any) -> Inputs:
    """The controls of a serving plan on the current container; sizes are printed in `unit`."""
    values = _model_and_gpu(unit)
    values["quantization"] = _option(
        "Quantization",
        "quantization",
        QUANTIZATIONS,
        "none",
        "How the weights are stored: none keeps 16 bits; the Q and IQ names are GGUF file types.",
    )
    left, right = st.columns(2, wrap=False)
    with left:
        values["context"] = _number(
            "Context length", "context", 8192, _LONGEST_SEQUENCE, "Tokens a sequence may reach, prompt and answer."
        )
    with right:
        values["concurrency"] = _number("Concurrency", "concurrency", 8, _MOST, "Sequences at a time.")
    with st.expander("Engine, cache format, GPUs"):
        left, right = st.columns(2)
        with left:
            engines = ("vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm", "ideal")
            values["engine"] = _option("Engine", "engine", engines, "vllm", "Whose rules for memory hold.")
            values["gpus"] = _number("GPUs in a node", "gpus", 1, _MOST, "What tensor parallelism leaves are replicas.")
        with right:
            values["kv"] = _option("Cache format", "kv", KV_CACHE_FORMATS, "auto", "auto: as the model computes.")
            values["tensor"] = _number("Tensor parallel", "tensor", 1, _MOST, "GPUs that share each layer.")
    document = {
        "kind": "serving",
        "model": values["model"] or "",
        "quantization": values["quantization"],
        "kv_cache": {"dtype": values["kv"]},
        "requests": {"context_length": values["context"], "concurrency": values["concurrency"]},
        "engine": values["engine"],
        "parallelism": {"tensor": values["tensor"]},
        "hardware": {"gpu": values["gpu"] or "", "gpus_per_node": values["gpus"]},
    }
    return Inputs(values, document)


def _finer_inputs(*, adapted: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    left, right = st.columns(2)
    with left:
        values["precision"] = _option(
            "Precision",
            "precision",
            tuple(PRECISION_RECIPES),
            "bf16",
            "bf16: everything in 16 bits. bf16-amp: fp32 weights, autocast. bf16-mixed: 16-bit weights, fp32 masters.",
        )
        values["rank"] = _number("Adapter rank", "rank", 16, _MOST, "Rank of lora and qlora.", disabled=not adapted)
        values["attention"] = _option(
            "Attention", "attention", ("sdpa", "flash", "eager"), "sdpa", "eager keeps the whole score matrix."
        )
        values["gpus"] = _number("GPUs in a node", "gpus", 1, _MOST, "All GPUs are data-parallel ranks.")
        values["zero"] = _option(
            "ZeRO stage",
            "zero",
            ("0", "1", "2", "3"),
            "0",
            "What is divided over the GPUs: 1 optimizer states, 2 gradients too, 3 weights too (FSDP).",
        )
    with right:
        values["optimizer"] = _option("Optimizer", "optimizer", OPTIMIZERS, "adamw", "The optimizer's own name.")
        values["targets"] = _option(
            "Adapted layers",
            "targets",
            ("all-linear", "default"),
            "all-linear",
            "default: the layers that peft chooses for the model.",
            disabled=not adapted,
        )
        values["loss"] = _option(
            "Loss",
            "loss",
            ("default", "chunked", "fused", "liger", "cce"),
            "default",
            "default: the implementation's own; the others never hold all logits at once.",
        )
        values["nodes"] = _number("Nodes", "nodes", 1, _MOST, "Machines with that many GPUs each.")
        values["accumulation"] = _number(
            "Accumulation", "accumulation", 1, _MOST, "Forward and backward passes in one optimizer step."
        )
    return values


def _model_and_gpu(unit: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    values["model"] = _choice(
        "Model", "model", model_names(), "Llama-3.1-8B", "A catalogue name, a hub id, or a path to a config.json."
    )
    values["gpu"] = _choice("GPU", "gpu", device_names(), "rtx-4090", "A name from the list, or an alias such as 4090.")
    st.caption(_card(values["gpu"], unit))
    return values


def _document(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plan document of these values; what the method does not read is left out."""
    method: dict[str, Any] = {"name": values["method"]}
    if values["method"] != "full":
        method["rank"] = values["rank"]
        if values["targets"] != "default":
            method["targets"] = values["targets"]
    return {
        "kind": "training",
        "model": values["model"] or "",
        "data": {
            "sequence_length": values["seq"],
            "micro_batch_size": values["batch"],
            "gradient_accumulation_steps": values["accumulation"],
        },
        "precision": values["precision"],
        "optimizer": values["optimizer"],
        "method": method,
        "recompute": values["recompute"],
        "attention": values["attention"],
        "loss": values["loss"],
        "parallelism": {"zero": int(values["zero"])},
        "hardware": {"gpu": values["gpu"] or "", "gpus_per_node": values["gpus"], "nodes": values["nodes"]},
    }


def _choice(label: str, key: str, options: tuple[str, ...], default: str, help: str) -> Any:
    """One of many names, or one that is typed."""
    return st.selectbox(
        label,
        options,
        index=options.index(default),
        key=key,
        help=help,
        accept_new_options=True,
        filter_mode="contains",
        **_URL,
    )


def _option(label: str, key: str, options: tuple[str, ...], default: str, help: str, *, disabled: bool = False) -> Any:
    return st.selectbox(label, options, index=options.index(default), key=key, help=help, disabled=disabled, **_URL)


def _number(label: str, key: str, default: int, largest: int, help: str, *, disabled: bool = False) -> int:
    return int(st.number_input(label, 1, largest, default, key=key, help=help, disabled=disabled, **_URL))


def _card(name: str | None, unit: Any) -> str:
    """The accelerator's title and what a plan may count on; empty when there is none, which the answer will say."""
    try:
        device = load_hardware(name or "")
        return f"{device.title}: {format_bytes(device.memory_capacity_bytes, unit)} for a process"
    except PlannerError:
        return ""

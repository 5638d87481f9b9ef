"""`planner train`, `finetune` and `serve`: flags that are fields of a plan, in tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from planner.cli.answers import as_json_option, fetch_option, show_answer, unit_option, verbose_option

__all__ = ["HARDWARE_FLAGS", "SERVING_FLAGS", "TRAINING_FLAGS", "document_of", "finetune", "serve", "train"]

_Flag = tuple[str, str, type, str]

HARDWARE_FLAGS: tuple[_Flag, ...] = (
    ("--gpu", "hardware.gpu", str, "Accelerator; `planner gpus` lists them."),
    ("--gpus", "hardware.gpus_per_node", int, "Accelerators in a node."),
    ("--nodes", "hardware.nodes", int, "Nodes."),
    ("--price", "hardware.price_per_gpu_hour", float, "US dollars for an accelerator hour."),
)
TRAINING_FLAGS: tuple[_Flag, ...] = (
    ("--seq", "data.sequence_length", int, "Tokens of a sequence."),
    ("--batch", "data.micro_batch_size", int, "Sequences in one forward pass of a rank."),
    ("--global-batch", "data.global_batch_size", int, "Sequences in one optimizer step."),
    ("--accumulation", "data.gradient_accumulation_steps", int, "Forward passes in one optimizer step."),
    ("--tokens", "data.tokens", str, "Tokens of the whole run, as in 15T."),
    ("--precision", "precision", str, "fp32, bf16, bf16-amp, bf16-mixed, fp8-mixed, ..."),
    ("--optimizer", "optimizer.name", str, "adamw, sgd, adafactor, adamw-8bit, muon, ..."),
    ("--method", "method.name", str, "full, lora, qlora, ia3, prefix, prompt, adapter or frozen."),
    ("--rank", "method.rank", int, "Rank of the adapters."),
    ("--targets", "method.targets", str, "Adapted modules, separated by commas, or all-linear."),
    ("--recompute", "recompute", str, "none, full, selective, sqrt, or a number k for every k-th block."),
    ("--attention", "attention", str, "eager, sdpa or flash."),
    ("--loss", "loss", str, "default, chunked, fused, liger or cce."),
    ("--implementation", "implementation.name", str, "transformers, compiled, megatron, torchtitan, ..."),
    ("--offload", "offload", str, "optimizer, parameters, activations, separated by commas."),
    ("--zero", "parallelism.zero", int, "Shard optimizer states (1), gradients too (2), parameters too (3)."),
    ("--data", "parallelism.data", int, "Data-parallel ranks."),
    ("--tensor", "parallelism.tensor", int, "Tensor-parallel ranks."),
    ("--pipeline", "parallelism.pipeline", int, "Pipeline stages."),
    ("--context", "parallelism.context", int, "Context-parallel ranks."),
    ("--expert", "parallelism.expert", int, "Expert-parallel ranks."),
)
SERVING_FLAGS: tuple[_Flag, ...] = (
    ("--context", "requests.context_length", int, "Tokens a sequence may reach."),
    ("--prompt", "requests.prompt_tokens", int, "Tokens of a prompt."),
    ("--output", "requests.output_tokens", int, "Tokens of an answer."),
    ("--concurrency", "requests.concurrency", int, "Sequences at a time."),
    ("--quantization", "quantization", str, "none, fp8, int8, nf4, gptq-4bit, awq-4bit, mxfp4, Q4_K_M, ..."),
    ("--kv-cache", "kv_cache.dtype", str, "Format of cached keys and values."),
    ("--engine", "engine", str, "vllm, sglang, transformers, llama.cpp, tensorrt-llm or ideal."),
    ("--utilization", "hardware.memory_utilization", float, "Share of the memory that the engine may claim."),
    ("--data", "parallelism.data", int, "Replicas."),
    ("--tensor", "parallelism.tensor", int, "Tensor-parallel ranks."),
    ("--pipeline", "parallelism.pipeline", int, "Pipeline stages."),
    ("--expert", "parallelism.expert", int, "Expert-parallel ranks."),
)


def _plan_command(
    name: str, kind: str, flags: tuple[_Flag, ...], preset: Mapping[str, Any], help: str
) -> click.Command:
    """A command whose flags are fields of a plan; `preset` holds fields that the flags may override."""

    def run(
        model: str, print_plan: bool, as_json: bool, fetch: bool, verbose: bool, unit: str | None, **given: Any
    ) -> None:
        fields = dict(preset)
        for _, path, _, _ in flags:
            if given[_destination(path)] is not None:
                fields[path] = given[_destination(path)]
        document = document_of(kind, model, fields)
        if print_plan:
            from planner.readers.plan_document import plan_from_mapping
            from planner.writers.plan_document import plan_to_yaml

            click.echo(plan_to_yaml(plan_from_mapping(document)), nl=False)
            return
        show_answer(document, as_json=as_json, fetch=fetch, verbose=verbose, unit=unit)

    command: Callable[..., Any] = run
    command = click.option("--print-plan", is_flag=True, help="Print the plan as YAML instead of answering it.")(
        command
    )
    for decorate in (unit_option, verbose_option, fetch_option, as_json_option):
        command = decorate(command)
    for flag, path, type, text in reversed(flags):
        command = click.option(flag, _destination(path), type=type, help=text)(command)
    return click.command(name, help=help)(click.argument("model")(command))


def _destination(path: str) -> str:
    return "field_" + path.replace(".", "_")


def document_of(kind: str, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A plan document from dotted names."""
    document: dict[str, Any] = {"kind": kind, "model": model}
    for path, value in fields.items():
        section, _, name = path.partition(".")
        if path == "recompute" and value.isdecimal():
            value = {"every": int(value)}
        if name:
            document.setdefault(section, {})[name] = value
        else:
            document[section] = value
    return document


train = _plan_command(
    "train",
    "training",
    HARDWARE_FLAGS + TRAINING_FLAGS,
    {},
    "Train MODEL: all weights, in bf16 unless said otherwise.",
)
finetune = _plan_command(
    "finetune",
    "training",
    HARDWARE_FLAGS + TRAINING_FLAGS,
    {"method.name": "lora"},
    "Fine-tune MODEL, with LoRA unless --method says otherwise.",
)
serve = _plan_command("serve", "serving", HARDWARE_FLAGS + SERVING_FLAGS, {}, "Serve MODEL to concurrent requests.")

"""The plan: one document that says what is to be run, as frozen values.

Every field but `model` has a default. Field names are the document's own names: the YAML or JSON form and these
values differ only in that a short form (`precision: bf16`, `optimizer: adamw`) has been expanded. Reading and writing
documents is `planner.readers.plan_document`'s work.

Sizes that a search varies (`micro_batch_size`, `sequence_length`, degrees) may also be NumPy integer arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Data",
    "Hardware",
    "Implementation",
    "KvCache",
    "Method",
    "Optimizer",
    "Parallelism",
    "Precision",
    "Recompute",
    "Requests",
    "ServingParallelism",
    "ServingPlan",
    "TrainingPlan",
]

FloatFormat = Literal["fp32", "bf16", "fp16"]
StateFormat = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What one step sees. Give `global_batch_size` or `gradient_accumulation_steps`, not both.

    sequence_length: tokens of one packed sequence; decoder tokens for encoder-decoder models.
    micro_batch_size: sequences in one forward pass on one data-parallel rank.
    tokens: tokens of the whole run (for time and money).
    lengths: constant: every sequence is as long (packed); varied: that is the longest, met now and then, so what the
        previous micro-batch leaves behind (its logits, in loops that keep them) is small beside it.
    """

    sequence_length: int = 2048
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    tokens: int | None = None
    lengths: Literal["constant", "varied"] = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Number formats of the training state and of the arithmetic.

    recipe: the name the formats came from, or `custom`.
    master_weights: None when the optimizer updates `weights` itself.
    autocast: weights are kept in `weights` and cast to `compute` op by op (torch.autocast), or layer by layer when
        parameters are gathered by FSDP.
    """

    recipe: str = "bf16"
    weights: FloatFormat = "bf16"
    gradients: FloatFormat = "bf16"
    master_weights: FloatFormat | None = None
    optimizer_states: StateFormat = "bf16"
    compute: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    autocast: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """The optimizer and how it is stepped.

    implementation: torch's own choice for CUDA is `foreach`; `fused` and `for-loop` are its flags.
    set_to_none: gradients are freed by zero_grad (torch's default) or kept and zeroed.
    in_backward: the update runs as soon as a gradient is ready and frees it (LOMO; torch's post-accumulate hooks).
    rank, update_proj_gap: GaLore's projection.
    """

    name: str = "adamw"
    implementation: Literal["foreach", "fused", "for-loop"] = "foreach"
    set_to_none: bool = True
    in_backward: bool = False
    rank: int = 128
    amsgrad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is trained.

    name: full, lora, qlora, ia3, prefix, prompt, adapter, frozen.
    targets: module names, or `("all-linear",)`; empty means the method's own default for the model.
    adapter_dtype: fp32 beside 16-bit weights, as peft does.
    quantization, double_quantization: base weights of qlora (nf4 or fp4).
    quantizes_head: the output projection is in 4 bits as well.
    upcast: what stands beside 4-bit linears is turned to fp32 (peft's prepare_model_for_kbit_training).
    upcast_embeddings: embeddings and head stay so; otherwise only norms do (trl's peft_module_casting_to_bf16, which
        SFTTrainer runs after it with bf16).
    virtual_tokens: prefix and prompt tuning. bottleneck: width of bottleneck adapters, one at the end of each branch of
        a block (`planner.ledger.bottleneck`).
    trainable_layers: `frozen` trains the last k blocks and the output projection (the embedding table, where they are
        tied); 0 trains that alone. The final norm stays frozen.
    train_embeddings: the embedding table and the output projection train in full as well; beside adapters they are
        copies, next to which the frozen originals stay (peft's modules_to_save, tied ones with ensure_weight_tying).
    """

    name: Literal["full", "lora", "qlora", "ia3", "prefix", "prompt", "adapter", "frozen"] = "full"
    rank: int = 8
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    dora: bool = False
    adapter_dtype: FloatFormat = "fp32"
    quantization: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    quantizes_head: bool = False
    upcast: bool = True
    upcast_embeddings: bool = True
    virtual_tokens: int = 20
    bottleneck: int = 64
    trainable_layers: int = 0
    train_embeddings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Activation checkpointing: `none`, `full` (each block), `selective` (the attention core), `every` k blocks,
    `sqrt` (about sqrt(n) segments, Chen et al. 2016)."""

    mode: Literal["none", "full", "selective", "every", "sqrt"] = "none"
    every: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """Whose modules run. version None means the newest one known.

    kernels: a library that replaces some of them: liger (Liger-Kernel) or foak (fms-acceleration's fused ops and kernels).
    """

    name: Literal["transformers", "megatron", "torchtitan", "torchtune", "litgpt"] = "transformers"
    version: str | None = None
    kernels: Literal["liger", "foak"] | None = None
    compiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """Degrees and sharding. data None: what the accelerators leave after the other degrees.

    zero: 0 replicates (DDP when data > 1), 1 shards optimizer states, 2 gradients too, 3 parameters too.
    engine: who shards; `auto` is torch DDP for 0, DeepSpeed for 1 and 2, FSDP2 for 3.
    replicas: HSDP: number of copies of the sharded model; shards are over data / replicas ranks.
    prefetch: how many blocks are gathered ahead of the running one.
    reshard_after_forward: whether a gathered block is freed after its forward pass (zero 3).
    bucket_bytes: DDP's gradient buckets, DeepSpeed's reduce buckets.
    """

    data: int | None = None
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    engine: Literal["auto", "ddp", "fsdp1", "fsdp2", "deepspeed", "megatron"] = "auto"
    replicas: int = 1
    prefetch: int = 1
    reshard_after_forward: bool = True
    bucket_bytes: int | None = None
    sequence_parallel: bool = False
    schedule: Literal["1f1b", "interleaved", "gpipe", "zero-bubble", "dualpipe", "dualpipev"] = "1f1b"
    virtual_stages: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Accelerators by profile name, how many, and what the user overrides.

    memory_utilization: share of device memory a serving engine may claim; None means the engine's own default.
    """

    gpu: str = "h100-sxm"
    gpus_per_node: int = 1
    nodes: int = 1
    price_per_gpu_hour: float | None = None
    memory_utilization: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Training or fine-tuning of `model` (a name, a path, or a config.json's content)."""

    model: str | Mapping[str, Any]
    data: Data = field(default_factory=Data)
    precision: Precision = field(default_factory=Precision)
    optimizer: Optimizer = field(default_factory=Optimizer)
    method: Method = field(default_factory=Method)
    recompute: Recompute = field(default_factory=Recompute)
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    loss: Literal["default", "chunked", "fused", "liger", "cce"] = "default"
    implementation: Implementation = field(default_factory=Implementation)
    parallelism: Parallelism = field(default_factory=Parallelism)
    offload: tuple[Literal["optimizer", "parameters", "activations"], ...] = ()
    hardware: Hardware = field(default_factory=Hardware)
    kind: Literal["training"] = "training"

    @property
    def gpus(self) -> int:
        """Accelerators, all nodes together."""
        return self.hardware.gpus_per_node * self.hardware.nodes

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks: as given, or what the accelerators leave after the other degrees (rounded down)."""
        p = self.parallelism
        return p.data if p.data is not None else self.gpus // (p.tensor * p.pipeline * p.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """Format of cached keys and values (`auto`: the weights' 16-bit format), and tokens in one block."""

    dtype: str = "auto"
    block_size: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The load. context_length: tokens a sequence may reach; None: prompt_tokens + output_tokens."""

    context_length: int | None = None
    prompt_tokens: int = 1024
    output_tokens: int = 256
    concurrency: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingParallelism:
    """Degrees of a serving deployment."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Inference of `model` under load. quantization: a weight format or a GGUF file type such as `Q4_K_M`."""

    model: str | Mapping[str, Any]
    quantization: str = "none"
    kv_cache: KvCache = field(default_factory=KvCache)
    requests: Requests = field(default_factory=Requests)
    engine: Literal["ideal", "vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm"] = "vllm"
    parallelism: ServingParallelism = field(default_factory=ServingParallelism)
    hardware: Hardware = field(default_factory=Hardware)
    kind: Literal["serving"] = "serving"

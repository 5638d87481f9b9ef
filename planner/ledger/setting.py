"""What of a plan decides what a pass keeps, and the tape that is set up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.ledger.adapters import adapter_for, is_target, preparation_for
from planner.ledger.gathering import Gathering, ShardedOperations, Unit
from planner.ledger.parameters import StateTensor, trained_around
from planner.ledger.profile import Profile
from planner.model.shape import ModelShape
from planner.plan import Method, Precision, Recompute

__all__ = ["Setting", "asks_inputs_for_gradients", "recomputes", "tape_for", "unit_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything about a plan that decides what a forward and backward pass keeps. B and S may be arrays."""

    micro_batch_size: Any
    sequence_length: Any
    precision: Precision
    method: Method
    recompute: Recompute
    attention: str
    loss: str
    profile: Profile
    accumulate: bool = False
    hooked: bool = False
    offload_activations: bool = False
    lengths: str = "constant"
    gathering: Gathering | None = None
    tensor: int = 1
    compiled: bool = False
    sequence_parallel: bool = False


def recomputes(recompute: Recompute) -> bool:
    """Whether whole blocks run again in backward."""
    return recompute.mode in ("full", "every", "sqrt")


def asks_inputs_for_gradients(setting: Setting) -> bool:
    """Whether the embedding's output is made to need a gradient, so that checkpointed blocks below the first that
    trains run again and backward, too.

    transformers does it whenever checkpointing is switched on (modeling_utils.py, enable_input_require_grads), and so
    does peft; others do it for adapters.
    """
    return setting.method.name in ("lora", "qlora", "ia3", "adapter") or setting.profile.name == "transformers"


def tape_for(shape: ModelShape, setting: Setting) -> ShardedOperations:
    """An empty tape on which this setting's formats, adapters and sharding hold."""
    precision, method = setting.precision, setting.method
    around = trained_around(shape, method)
    head = shape.head.name if shape.head is not None else ""
    virtual = method.virtual_tokens if method.name == "prompt" else 0
    full = method.name == "full"
    packed = method.name == "qlora"
    base = "fp32" if packed and method.upcast and method.upcast_embeddings else precision.weights
    norms_upcast = packed and bool(method.upcast)

    def quantized(name: str) -> bool:
        return packed and (name != "lm_head" or method.quantizes_head)

    gathering = setting.gathering
    if gathering is not None and gathering.shards_weights and gathering.casts:
        base = precision.compute
    return ShardedOperations(
        gathering=gathering,
        sizes={"1": 1, "B": setting.micro_batch_size, "S": setting.sequence_length + virtual},
        accumulate=setting.accumulate and gathering is None,
        keeps_shares=not setting.accumulate,
        offloads=setting.offload_activations,
        hooked=setting.hooked,
        reentrant=setting.profile.reentrant,
        profile=setting.profile,
        attention=setting.attention,
        tensor=setting.tensor,
        compiled=setting.compiled,
        sequence_parallel=setting.sequence_parallel,
        selective=setting.recompute.mode == "selective",
        weight_dtype=lambda name: "fp32" if norms_upcast and ("norm" in name or ".ln_" in name) else base,
        trainable=lambda name: full or name in around,
        compute=precision.compute if precision.autocast and not (gathering and gathering.casts) else None,
        unpacked=precision.compute,
        packed_from=setting.profile.packs_from or precision.weights,
        double_quantization=method.double_quantization,
        quantized=quantized,
        method=method,
        follows_equal=setting.lengths == "constant",
        targeted=lambda name: method.name in ("lora", "qlora") and is_target(method, name, head),
        adapter=adapter_for(method, head),
        prepare=preparation_for(method, head),
    )


def unit_of(tensors: Sequence[StateTensor], setting: Setting) -> Unit:
    """Sizes of one gathered unit: its tensors by the format they are gathered in, and those that train."""
    gathered: dict[str, int] = {}
    trained: dict[str, int] = {}
    gathering = setting.gathering
    casts = gathering is not None and gathering.casts
    frozen = any(not tensor.trainable for tensor in tensors)
    # FSDP1's flat vectors have one format each: adapters are small units of their own, gathered one at a time
    # (peft/utils/other.py, fsdp_auto_wrap_policy).
    apart = frozen and gathering is not None and gathering.engine == "fsdp1"
    for tensor in tensors:
        elements = tensor.repeat * tensor.elements
        if tensor.packed:
            gathered["uint8"] = gathered.get("uint8", 0) + elements // 2
            continue
        dtype = setting.precision.compute if casts else tensor.dtype
        if not (apart and tensor.trainable):
            gathered[dtype] = gathered.get(dtype, 0) + elements
        if tensor.trainable:
            trained[dtype] = trained.get(dtype, 0) + elements
    return Unit(tuple(gathered.items()), tuple(trained.items()), frozen)

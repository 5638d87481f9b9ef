"""The memory of a training step on one rank: states, the pass over them, the optimizer's step, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from planner.errors import NotCovered, PlanError
from planner.formats import BITS
from planner.hardware import Device
from planner.ledger.arrangement import arranged, settled
from planner.ledger.gathering import Gathering
from planner.ledger.parameters import StateTensor, state_tensors
from planner.ledger.profile import Profile, profile_named
from planner.ledger.record import CATEGORIES
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.ledger.tape import allocated_bytes
from planner.memory.device import workspace_bytes
from planner.memory.moments import PassLevels, pass_levels
from planner.memory.optimizers import OptimizerBytes, optimizer_bytes
from planner.memory.sharding import Held, engine_of, held_by_a_rank
from planner.memory.states import gradient_bytes, weight_bytes
from planner.model.shape import ModelShape
from planner.model.tensor_parallel import local_shape
from planner.plan import TrainingPlan

__all__ = ["TrainingMemory", "accumulation_steps", "training_memory"]

LARGEST_MICRO_BATCH_TOKENS = 2**36
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000  # runtime/zero/config.py: reduce_bucket_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes of one rank. moments: level at each moment; breakdowns: what makes it up, adding up to the byte."""

    moments: Mapping[str, int]
    breakdowns: Mapping[str, Mapping[str, int]]
    peak_moment: str
    host_bytes: int
    managed_bytes: int

    @property
    def peak_allocated(self) -> int:
        """What torch.cuda.max_memory_allocated() reads, in bytes."""
        return self.moments[self.peak_moment]

    @property
    def breakdown(self) -> Mapping[str, int]:
        """Bytes by category at the peak moment."""
        return self.breakdowns[self.peak_moment]


def accumulation_steps(plan: TrainingPlan) -> int:
    """Micro-batches in one optimizer step on one rank."""
    if plan.data.gradient_accumulation_steps is not None:
        return plan.data.gradient_accumulation_steps
    if plan.data.global_batch_size is None:
        return 1
    once = plan.data.micro_batch_size * plan.data_ranks
    if plan.data.global_batch_size % once:
        raise PlanError(
            f"global_batch_size {plan.data.global_batch_size} is not a multiple of "
            f"micro_batch_size x data-parallel ranks = {once}."
        )
    return plan.data.global_batch_size // once


def training_memory(plan: TrainingPlan, shape: ModelShape, device: Device) -> TrainingMemory:
    """Moments and breakdown of a steady-state step. Raises NotCovered for what the ledger has no rows for."""
    _covered(plan)
    data = plan.data_ranks
    profile = profile_named(plan.implementation.name, plan.implementation.version, plan.implementation.kernels)
    shape = local_shape(arranged(shape, profile), plan.parallelism.tensor)
    plan = replace(plan, method=settled(plan.method, plan.precision, profile, shape))
    tensors = state_tensors(shape, plan.method, plan.precision)
    held = held_by_a_rank(tensors, plan.parallelism, data)
    engine = engine_of(plan.parallelism, data)
    main = plan.precision.gradients != plan.precision.weights and engine not in ("fsdp1", "fsdp2")
    persistent = accumulation_steps(plan) > 1 or not plan.optimizer.set_to_none or main
    stepped = _optimizer(plan, held)
    levels = _levels(shape, _setting(plan, profile, engine, data, persistent))
    base, host = _base(plan, held, stepped, device, engine, data)
    gradients = _gradients(plan, held, main, engine)
    # FSDP1 with use_orig_params: zero_grad frees views; their flat gradient stays until the next forward pass begins.
    stays = main or not plan.optimizer.set_to_none or (engine == "fsdp1" and plan.parallelism.zero == 3)
    return _moments(plan, levels, base, gradients, persistent, stays, stepped, host)


@lru_cache(maxsize=64)
def _levels(shape: ModelShape, setting: Setting) -> PassLevels:
    return pass_levels(record_step(shape, setting))


def _covered(plan: TrainingPlan) -> None:
    p = plan.parallelism
    degrees = {"pipeline": p.pipeline, "context": p.context, "expert": p.expert}
    if plan.implementation.name != "megatron":
        degrees = {"tensor": p.tensor, **degrees}
    for name, degree in degrees.items():
        if degree > 1:
            raise NotCovered(
                f"parallelism.{name} = {degree} is not covered by the training memory of this version; data "
                "parallelism with zero 0 to 3 is, and tensor with implementation megatron."
            )
    tokens = plan.data.micro_batch_size * plan.data.sequence_length
    if tokens > LARGEST_MICRO_BATCH_TOKENS:
        raise PlanError(
            f"data.micro_batch_size x data.sequence_length = {tokens:,} tokens in one forward pass; at most "
            f"{LARGEST_MICRO_BATCH_TOKENS:,} are counted."
        )
    if plan.implementation.name == "megatron" and (p.zero > 1 or plan.method.name != "full"):
        raise NotCovered("implementation megatron is covered for full training, with zero 0 or 1.")
    if p.sequence_parallel and plan.data.sequence_length % p.tensor:
        raise PlanError(
            f"sequence_parallel divides the sequence over tensor = {p.tensor} ranks, "
            f"which does not divide sequence_length {plan.data.sequence_length}."
        )
    if "parameters" in plan.offload and p.zero != 3:
        raise PlanError(
            f"offload: parameters needs parallelism.zero 3, which gathers them block by block, not {p.zero}."
        )
    if plan.precision.compute == "fp8":
        raise NotCovered("precision fp8-mixed is not covered by the training memory of this version.")


def _setting(plan: TrainingPlan, profile: Profile, engine: str, data: int, persistent: bool) -> Setting:
    zero = plan.parallelism.zero
    ranks = data // plan.parallelism.replicas
    gathering = None
    offloads = "parameters" in plan.offload
    if zero >= 2 and (ranks > 1 or offloads):
        fsdp = engine in ("fsdp1", "fsdp2")
        casts = fsdp and plan.precision.weights == "fp32" and plan.precision.compute in ("bf16", "fp16")
        gathering = Gathering(
            engine=engine,
            ranks=ranks,
            reduce_format=plan.precision.gradients if engine == "fsdp2" and casts else None,
            kept_format=_kept_format(plan, fsdp, casts),
            shards_weights=zero == 3,
            casts=casts,
            reshard=plan.parallelism.reshard_after_forward,
            prefetch=0 if _never_prefetches(plan, profile, engine) else plan.parallelism.prefetch,
        )
    return Setting(
        micro_batch_size=plan.data.micro_batch_size,
        sequence_length=plan.data.sequence_length,
        precision=plan.precision,
        method=plan.method,
        recompute=plan.recompute,
        attention=plan.attention,
        loss=plan.loss,
        lengths=plan.data.lengths,
        profile=profile,
        accumulate=persistent,
        hooked=plan.optimizer.in_backward or plan.optimizer.name == "lomo",
        offload_activations="activations" in plan.offload,
        gathering=gathering,
        tensor=plan.parallelism.tensor,
        compiled=plan.implementation.compiled,
        sequence_parallel=plan.parallelism.sequence_parallel and plan.parallelism.tensor > 1,
    )


def _kept_format(plan: TrainingPlan, fsdp: bool, casts: bool) -> str | None:
    """Format of a reduced gradient: FSDP returns it to the sharded weight's own (None), whatever it was reduced in."""
    if not fsdp:
        return plan.precision.gradients
    return plan.precision.weights if casts else None


def _never_prefetches(plan: TrainingPlan, profile: Profile, engine: str) -> bool:
    """FSDP1 gathers no block ahead in backward when reentrant checkpointing wraps its units.

    A unit is prefetched only if its forward pass registered a pre-backward hook (_runtime_utils.py,
    _get_handle_to_prefetch and _register_pre_backward_hooks), which needs outputs that require a gradient: the first
    forward pass of a reentrant checkpoint runs without.
    """
    return engine == "fsdp1" and profile.reentrant and plan.recompute.mode in ("full", "every", "sqrt")


def _optimizer(plan: TrainingPlan, held: Held) -> OptimizerBytes:
    """The optimizer works on the master weights where there are any."""
    master = plan.precision.master_weights
    tensors: tuple[StateTensor, ...] = held.optimizer
    if master is not None:
        tensors = tuple(replace(tensor, dtype=master) if tensor.trainable else tensor for tensor in tensors)
    result = optimizer_bytes(plan.optimizer, tensors, plan.precision.optimizer_states)
    if master is not None and plan.precision.gradients != master:
        copy = sum(t.repeat * allocated_bytes(t.elements * BITS[master] // 8) for t in tensors if t.trainable)
        result = replace(result, step=result.step + copy)  # the gradient's copy in the master format
    if plan.optimizer.in_backward:
        biggest = max((t.elements * BITS[t.dtype] // 8 for t in tensors if t.trainable), default=0)
        result = replace(result, step=allocated_bytes(min(biggest, result.step)))
    return result


def _base(
    plan: TrainingPlan, held: Held, stepped: OptimizerBytes, device: Device, engine: str, data: int
) -> tuple[dict[str, int], int]:
    """What outlives every step on the GPU, by category, and the bytes that offload moves to the host."""
    master = plan.precision.master_weights
    weights = weight_bytes(held.weights, plan.method)
    masters = gradient_bytes(held.optimizer, master) if master is not None else 0
    states, host = stepped.states, stepped.paged
    if "optimizer" in plan.offload:
        host += states + masters + gradient_bytes(held.optimizer, "fp32")
        states = masters = 0
    if "parameters" in plan.offload:
        host += weights
        weights = 0
    return {
        "weights": weights,
        "master_weights": masters,
        "optimizer_states": states,
        "communication_buffers": _buckets(plan, held, engine, data),
        "library_workspaces": workspace_bytes(device),
    }, host


def _buckets(plan: TrainingPlan, held: Held, engine: str, data: int) -> int:
    """Persistent buffers of gradient reduction.

    DDP (torch/csrc/distributed/c10d/reducer.cpp): flat buckets as large as all gradients together.
    DeepSpeed stages 1, 2 (runtime/zero/stage_1_and_2.py): two reduce buckets (overlap_comm) in the gradients' format.
    """
    if data == 1:
        return 0
    if engine == "ddp":
        return gradient_bytes(held.gradients)
    if engine == "deepspeed" and plan.parallelism.zero in (1, 2):
        width = BITS[plan.precision.gradients] // 8
        bucket = plan.parallelism.bucket_bytes or DEEPSPEED_BUCKET_ELEMENTS * width
        return 2 * min(bucket, gradient_bytes(held.weights, plan.precision.gradients))
    return 0


def _gradients(plan: TrainingPlan, held: Held, main: bool, engine: str) -> int:
    if plan.optimizer.in_backward or plan.optimizer.name == "lomo":
        return 0
    sharded = plan.parallelism.zero == 3 and engine not in ("fsdp1", "fsdp2")
    return gradient_bytes(held.gradients, plan.precision.gradients if main or sharded else None)


def _moments(
    plan: TrainingPlan,
    levels: PassLevels,
    base: dict[str, int],
    gradients: int,
    persistent: bool,
    stays: bool,
    stepped: OptimizerBytes,
    host: int,
) -> TrainingMemory:
    kept = gradients if persistent else 0
    offloaded = "optimizer" in plan.offload
    breakdowns = {
        "forward_end": _with(base, kept, levels.end_breakdown),
        "forward_peak": _with(base, kept, levels.forward_breakdown),
        "backward_peak": _with(base, kept, levels.backward_breakdown),
        "optimizer_peak": _with(base, gradients, {"temporaries": 0 if offloaded else stepped.step}),
        "steady": _with(base, gradients if stays else 0, {}),
    }
    moments = {name: sum(parts.values()) for name, parts in breakdowns.items()}
    peak = max(("forward_peak", "backward_peak", "optimizer_peak"), key=lambda name: moments[name])
    return TrainingMemory(
        moments=moments,
        breakdowns=breakdowns,
        peak_moment=peak,
        host_bytes=host + levels.host_bytes,
        managed_bytes=stepped.paged,
    )


def _with(base: Mapping[str, int], gradients: int, levels: Mapping[str, int]) -> dict[str, int]:
    names = ("weights", "master_weights", "gradients", "optimizer_states", *CATEGORIES, "library_workspaces")
    result = {name: int(base.get(name, 0)) + int(levels.get(name, 0)) for name in names}
    result["gradients"] += gradients
    return result

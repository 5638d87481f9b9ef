"""The answer to a training plan: one immutable value with every figure, what was assumed, and what is not modelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from planner.answer.common import Parameters, model_warnings, name_of
from planner.hardware import Device
from planner.ledger.parameters import state_tensors
from planner.ledger.profile import profile_named
from planner.ledger.weights import active_parameters
from planner.memory.device import DeviceTerm, device_terms
from planner.memory.sharding import engine_of
from planner.memory.training import TrainingMemory, accumulation_steps, training_memory
from planner.model.shape import ModelShape
from planner.plan import TrainingPlan
from planner.verdict import Verdict, verdict_of

if TYPE_CHECKING:
    import pandas

__all__ = ["TrainingEstimate", "answer_training"]

NOT_MODELLED = (
    "time, throughput and cost are not computed by this version; the fields are null.",
    "fragmentation of the caching allocator is a band around peak_reserved, not a simulation of it.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEstimate:
    """A training plan's answer. Bytes are of the worst rank."""

    plan: TrainingPlan
    parameters: Parameters
    memory: TrainingMemory
    terms: tuple[DeviceTerm, ...]
    capacity: int
    verdict: Verdict
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    next_commands: tuple[str, ...]

    @property
    def peak_reserved(self) -> int:
        """What torch.cuda.max_memory_reserved() reads, in bytes: the centre of a band, cut at the capacity."""
        return min(self.memory.peak_allocated + self.terms[0].bytes, max(self.capacity, self.memory.peak_allocated))

    @property
    def device_used(self) -> int:
        """What nvidia-smi shows, in bytes: the centre of a band."""
        return self.peak_reserved + sum(term.bytes for term in self.terms[1:])

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain data: bytes as integers, nothing rounded."""
        memory = self.memory
        return {
            "kind": "training",
            "parameters": asdict(self.parameters),
            "memory": {
                "peak_allocated": memory.peak_allocated,
                "peak_moment": memory.peak_moment,
                "moments": dict(memory.moments),
                "peak_reserved": self.peak_reserved,
                "device_used": self.device_used,
                "capacity": self.capacity,
                "fits": self.verdict.outcome != "does_not_fit",
                "breakdown": dict(memory.breakdown),
                "breakdowns": {moment: dict(parts) for moment, parts in memory.breakdowns.items()},
                "device_terms": {term.name: _term(term) for term in self.terms},
                "host_memory": memory.host_bytes,
                "managed_memory": memory.managed_bytes,
            },
            "verdict": asdict(self.verdict),
            "time": None,
            "cost": None,
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "next_commands": list(self.next_commands),
        }

    def to_frame(self) -> pandas.DataFrame:
        """One row a moment, one column a category, in bytes. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.memory.breakdowns).T.rename_axis("moment")


def answer_training(
    plan: TrainingPlan, shape: ModelShape, device: Device, *, defaults: Sequence[str] = (), notes: Sequence[str] = ()
) -> TrainingEstimate:
    """Memory and verdict of a training plan. `defaults` are the fields the plan left open, with their values."""
    memory = training_memory(plan, shape, device)
    terms = device_terms(device, memory.peak_allocated, plan.gpus)
    verdict = verdict_of(memory.peak_allocated, terms, device.memory_capacity_bytes, moment=memory.peak_moment)
    tensors = state_tensors(shape, plan.method, plan.precision)
    counts = Parameters(
        total=sum(tensor.repeat * tensor.elements for tensor in tensors),
        trainable=sum(tensor.repeat * tensor.elements for tensor in tensors if tensor.trainable),
        active=active_parameters(shape),
    )
    return TrainingEstimate(
        plan=plan,
        parameters=counts,
        memory=memory,
        terms=terms,
        capacity=device.memory_capacity_bytes,
        verdict=verdict,
        assumptions=(
            *_training_assumptions(plan),
            *_inputs(shape, plan),
            *notes,
            *(f"default: {field}" for field in defaults),
        ),
        warnings=(*model_warnings(shape), *_plan_warnings(plan), *NOT_MODELLED),
        next_commands=_next_training(plan, verdict),
    )


def _term(term: DeviceTerm) -> dict[str, Any]:
    return {
        "bytes": term.bytes,
        "low_bytes": term.low_bytes,
        "high_bytes": term.high_bytes,
        "source": term.source.title,
    }


def _training_assumptions(plan: TrainingPlan) -> tuple[str, ...]:
    """What the figures rest on, most telling first."""
    profile = profile_named(plan.implementation.name, plan.implementation.version)
    data = plan.data_ranks
    precision = plan.precision
    steps = accumulation_steps(plan)
    lifetime = "kept between micro-batches" if steps > 1 else "freed by zero_grad(set_to_none=True)"
    if not plan.optimizer.set_to_none:
        lifetime = "kept and zeroed between steps"
    if plan.optimizer.in_backward:
        lifetime = "consumed in backward as soon as they are ready"
    sharding = f"ZeRO stage {plan.parallelism.zero} by {engine_of(plan.parallelism, data)} over {data} ranks"
    return (
        f"modules of {profile.name} {profile.version}, {plan.attention} attention, {plan.loss} loss",
        f"weights {precision.weights}, gradients {precision.gradients} ({lifetime}), optimizer states "
        f"{precision.optimizer_states}, master weights {precision.master_weights or 'none'}, "
        f"compute {precision.compute}{' under autocast' if precision.autocast else ''}",
        f"{plan.optimizer.name} stepped {plan.optimizer.implementation}",
        "no sharding, one rank" if data == 1 else sharding,
        "packed sequences of the full length; steady state (the second step on)",
    )


def _inputs(shape: ModelShape, plan: TrainingPlan) -> tuple[str, ...]:
    """What one example is, where it is not a sequence of as many tokens as the plan says."""
    if shape.image is not None:
        channels, height, width = shape.image
        if shape.tokens is None:
            return (
                f"micro_batch_size counts pairs of an image of {channels} x {height} x {width} pixels and a text of "
                "sequence_length tokens",
            )
        return (
            f"micro_batch_size counts images of {channels} x {height} x {width} pixels, {shape.tokens} tokens each; "
            "sequence_length does not apply",
        )
    audio = next((tower for tower in shape.towers if tower.role == "encoder" and tower.tokens is not None), None)
    if audio is not None:
        return (
            f"sequence_length {plan.data.sequence_length} is the decoder's; the encoder has {audio.tokens} positions",
        )
    return ()


def _plan_warnings(plan: TrainingPlan) -> tuple[str, ...]:
    """What the plan asks for and the ledger answers only from one side."""
    if plan.implementation.compiled:
        return (
            "compiled: what torch.compile fuses away inside blocks is not in the ledger; blocks are the eager modules'.",
        )
    return ()


def _next_training(plan: TrainingPlan, verdict: Verdict) -> tuple[str, ...]:
    """Three commands that a person in this situation is most likely to want."""
    command = f"planner finetune {name_of(plan)} --gpu {plan.hardware.gpu}"
    if verdict.outcome == "fits":
        return (
            f"{command} --method {plan.method.name} --batch {2 * plan.data.micro_batch_size}",
            f"{command} --method {plan.method.name} --seq {2 * plan.data.sequence_length}",
            f"planner trace PLAN  # replay the real {plan.implementation.name} step, byte by byte",
        )
    options = []
    if plan.recompute.mode == "none":
        options.append(f"{command} --method {plan.method.name} --recompute full")
    if plan.method.name == "full":
        options.append(f"{command} --method lora --recompute full")
    if plan.method.name != "qlora":
        options.append(f"{command} --method qlora --recompute full")
    if plan.parallelism.zero < 3:
        options.append(f"planner train {name_of(plan)} --gpu {plan.hardware.gpu} --gpus 8 --zero 3")
    options.append("planner gpus  # accelerators with more memory")
    return tuple(options[:3])

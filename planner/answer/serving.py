"""The answer to a serving plan: one immutable value with every figure, what was assumed, and what is not modelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from planner.answer.common import Parameters, model_warnings, name_of
from planner.hardware import Device
from planner.ledger.weights import active_parameters, parameter_counts
from planner.memory.serving import ServingMemory, serving_memory
from planner.model.shape import ModelShape
from planner.plan import ServingPlan
from planner.verdict import Verdict, serving_verdict

if TYPE_CHECKING:
    import pandas

__all__ = ["ServingEstimate", "answer_serving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEstimate:
    """A serving plan's answer. Bytes are of one accelerator of one replica."""

    plan: ServingPlan
    parameters: Parameters
    memory: ServingMemory
    verdict: Verdict
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    next_commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain data: bytes as integers, nothing rounded."""
        return {
            "kind": "serving",
            "parameters": asdict(self.parameters),
            "memory": self.memory.to_dict(),
            "verdict": asdict(self.verdict),
            "latency": None,
            "throughput": None,
            "cost": None,
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "next_commands": list(self.next_commands),
        }

    def to_frame(self) -> pandas.DataFrame:
        """One row a category of the device's memory, in bytes. Needs pandas."""
        import pandas

        return pandas.DataFrame({"bytes": self.memory.breakdown}).rename_axis("category")


def answer_serving(
    plan: ServingPlan, shape: ModelShape, device: Device, *, defaults: Sequence[str] = (), notes: Sequence[str] = ()
) -> ServingEstimate:
    """Memory and verdict of a serving plan."""
    memory = serving_memory(plan, shape, device)
    total = parameter_counts(shape)["total"]
    return ServingEstimate(
        plan=plan,
        parameters=Parameters(total=total, trainable=0, active=active_parameters(shape)),
        memory=memory,
        verdict=serving_verdict(memory),
        assumptions=(*memory.assumptions, *notes, *(f"default: {field}" for field in defaults)),
        warnings=(
            *model_warnings(shape),
            *memory.warnings,
            "latency, throughput and cost are not computed by this version; the fields are null.",
        ),
        next_commands=(
            f"planner serve {name_of(plan)} --gpu {plan.hardware.gpu} --quantization nf4",
            f"planner finetune {name_of(plan)} --gpu {plan.hardware.gpu} --method qlora",
            "planner gpus",
        ),
    )

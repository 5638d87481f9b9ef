"""Which library each optimizer of the dry run is, and how it is made for a model's parameters.

adam, adamw, sgd, sgd-momentum,    torch.optim
rmsprop, adagrad, torch-adafactor
adafactor                          transformers.optimization.Adafactor, which the Trainer's optim="adafactor" runs
muon                               torch.optim.Muon for the matrices inside the blocks, its AdamW for the rest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["STEPPERS", "Stepper", "stepper_for"]


class Stepper:
    """One or more optimizers that step one after another."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        """Update every parameter."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool) -> None:
        """Free the gradients, or fill them with zeros."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def states(self) -> list[tuple[str, torch.Tensor, bool]]:
        """Every tensor of the states: its key, the tensor, and whether it is a step counter kept on the host."""
        found = []
        for optimizer in self.optimizers:
            on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        found.append((key, value, key == "step" and not on_device))
        return found


def stepper_for(
    name: str, parameters: Sequence[tuple[str, torch.nn.Parameter]], settings: Mapping[str, Any]
) -> Stepper:
    """The optimizer `name` over named parameters. settings: keyword arguments that go before its own."""
    return STEPPERS[name](parameters, settings)


Named = Sequence[tuple[str, torch.nn.Parameter]]


def _torch(name: str, **own: Any) -> Callable[[Named, Mapping[str, Any]], Stepper]:
    def make(parameters: Named, settings: Mapping[str, Any]) -> Stepper:
        given = {"lr": 1e-4, **({} if "fused" in settings else {"foreach": True}), **own, **settings}
        return Stepper(getattr(torch.optim, name)([parameter for _, parameter in parameters], **given))

    return make


def _adafactor(parameters: Named, settings: Mapping[str, Any]) -> Stepper:
    from transformers.optimization import Adafactor

    given = {"lr": 1e-4, "scale_parameter": False, "relative_step": False, **settings}  # as the Trainer sets it
    given.pop("foreach", None)
    return Stepper(Adafactor([parameter for _, parameter in parameters], **given))


def _muon(parameters: Named, settings: Mapping[str, Any]) -> Stepper:
    inside = [p for name, p in parameters if p.dim() == 2 and any(part.isdigit() for part in name.split("."))]
    chosen = {id(parameter) for parameter in inside}
    others = [(name, parameter) for name, parameter in parameters if id(parameter) not in chosen]
    muon = torch.optim.Muon(inside, lr=1e-4)
    return Stepper(muon, *_torch("AdamW")(others, settings).optimizers)


STEPPERS: dict[str, Callable[[Named, Mapping[str, Any]], Stepper]] = {
    "adamw": _torch("AdamW"),
    "adam": _torch("Adam"),
    "sgd": _torch("SGD"),
    "sgd-momentum": _torch("SGD", momentum=0.9),
    "adafactor": _adafactor,
    "torch-adafactor": _torch("Adafactor"),
    "rmsprop": _torch("RMSprop"),
    "adagrad": _torch("Adagrad"),
    "muon": _muon,
}

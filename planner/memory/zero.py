"""Training states of one rank under ZeRO, and nothing else: the figures of arXiv:1910.02054.

The paper counts states alone: weights, gradients, and for mixed-precision Adam K = 12 bytes a parameter (fp32 master
weights and two moments). These functions fold the same tensors through the same functions as a plan's answer does, so
that agreement with the paper says something about the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from planner.ledger.parameters import StateTensor
from planner.memory.optimizers import optimizer_bytes
from planner.memory.sharding import held_by_a_rank
from planner.memory.states import gradient_bytes, weight_bytes
from planner.plan import Method, Optimizer, Parallelism, Precision

__all__ = ["MIXED_PRECISION_ADAM", "one_vector", "zero_state_bytes"]

# 16-bit weights and gradients, fp32 master weights and moments: the paper's section 3.1 (the recipe fp16-mixed).
MIXED_PRECISION_ADAM = Precision(
    recipe="fp16-mixed",
    weights="fp16",
    gradients="fp16",
    master_weights="fp32",
    optimizer_states="fp32",
    compute="fp16",
)


def zero_state_bytes(
    tensors: Sequence[StateTensor],
    *,
    ranks: int,
    stage: Literal[0, 1, 2, 3],
    precision: Precision = MIXED_PRECISION_ADAM,
    optimizer: Optimizer | None = None,
) -> Mapping[str, int]:
    """Bytes of weights, gradients, master weights and optimizer states that one of `ranks` ranks keeps.

    stage: 0 replicates; 1 divides master weights and optimizer states, 2 gradients too, 3 weights too. With P trained
    parameters, N ranks and the default formats:

        stage 0    (2 + 2 + 12) P
        stage 1    (2 + 2) P + 12 P / N
        stage 2    2 P + (2 + 12) P / N
        stage 3    (2 + 2 + 12) P / N

    each tensor rounded up to what the allocator hands out. Not counted: gathered weights, buffers, activations.

    >>> states = zero_state_bytes(one_vector(7_500_000_000), ranks=64, stage=1)
    >>> f"{sum(states.values()) / 1e9:.1f} GB"
    '31.4 GB'
    """
    divided = Parallelism(data=ranks, zero=stage, engine="deepspeed" if stage else "ddp")
    held = held_by_a_rank(tensors, divided, ranks)
    master = precision.master_weights
    stepped = tuple(replace(tensor, dtype=master or tensor.dtype) for tensor in held.optimizer)
    states = optimizer_bytes(optimizer or Optimizer(name="adam"), stepped, precision.optimizer_states)
    return {
        "weights": weight_bytes(held.weights, Method()),
        "gradients": gradient_bytes(held.gradients, precision.gradients),
        "master_weights": gradient_bytes(held.optimizer, master) if master else 0,
        "optimizer_states": states.states,
    }


def one_vector(parameters: int, *, dtype: str = "fp16") -> tuple[StateTensor, ...]:
    """A model that is only a size: all its parameters in one trained vector, as ZeRO flattens them."""
    return (
        StateTensor(
            name="flat parameter",
            shape=(parameters,),
            kind="other",
            dtype=dtype,
            trainable=True,
            repeat=1,
            unit="block",
        ),
    )

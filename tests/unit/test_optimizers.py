"""Optimizer states and step temporaries, added up by hand for two tensors."""

from __future__ import annotations

import pytest

from planner.errors import UnknownField
from planner.ledger.parameters import StateTensor
from planner.memory.optimizers import OPTIMIZERS, optimizer_bytes
from planner.plan import Optimizer

MATRIX = StateTensor(name="w", shape=(4096, 1024), kind="linear", dtype="fp32", trainable=True, repeat=3, unit="block")
VECTOR = StateTensor(name="b", shape=(1024,), kind="bias", dtype="fp32", trainable=True, repeat=3, unit="block")
FROZEN = StateTensor(name="f", shape=(9999, 99), kind="linear", dtype="fp32", trainable=False, repeat=1, unit="root")
N, V = 4096 * 1024, 1024


def states(name: str, **fields: object) -> tuple[int, int]:
    result = optimizer_bytes(Optimizer(name=name, **fields), [MATRIX, VECTOR, FROZEN], "fp32")  # type: ignore[arg-type]
    return result.states, result.step


@pytest.mark.parametrize(
    ("name", "fields", "expected_states", "expected_step"),
    [
        ("sgd", {}, 0, 0),
        ("sgd-momentum", {}, 3 * 4 * (N + V), 0),
        ("adamw", {}, 3 * 8 * (N + V), 3 * 4 * (N + V)),
        ("adamw", {"implementation": "for-loop"}, 3 * 8 * (N + V), 8 * N),
        ("adamw", {"implementation": "fused"}, 3 * 8 * (N + V) + 6 * 512, 0),
        ("adam", {"amsgrad": True}, 3 * 12 * (N + V), 3 * 4 * (N + V)),
        ("lomo", {}, 0, 0),
        # two 8-bit states with an fp32 absmax for every 256 elements; the vector is too small and keeps fp32
        ("adamw-8bit", {}, 3 * (2 * N + 2 * 4 * N // 256 + 8 * V) + 2 * 1024, 0),
        ("paged-adamw-8bit", {}, 3 * (2 * 4 * N // 256 + 8 * V) + 2 * 1024, 0),
    ],
)
def test_by_hand(name: str, fields: dict[str, object], expected_states: int, expected_step: int) -> None:
    assert states(name, **fields) == (expected_states, expected_step)


def test_paged_states_are_counted_apart() -> None:
    assert optimizer_bytes(Optimizer(name="paged-adamw-8bit"), [MATRIX, VECTOR], "fp32").paged == 3 * 2 * N


def test_frozen_tensors_have_no_state() -> None:
    for name in OPTIMIZERS:
        result = optimizer_bytes(Optimizer(name=name), [FROZEN], "fp32")
        assert result.paged == 0
        assert result.states <= 2 * 1024, name  # bitsandbytes' two shared maps


def test_an_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(UnknownField, match='did you mean "adafactor"'):
        optimizer_bytes(Optimizer(name="adafactr"), [MATRIX], "fp32")

"""ZeRO's Figure 1 and Table 1 (arXiv:1910.02054): states of one rank, from the functions that answer plans."""

from __future__ import annotations

import pytest

import planner
from planner.ledger.parameters import state_tensors
from planner.memory.zero import MIXED_PRECISION_ADAM, one_vector, zero_state_bytes
from planner.plan import Method
from planner.readers.models import load_model

BILLION = 10**9
GB = 10**9

# Figure 1: 7.5 billion parameters, 64 ranks, K = 12; GB of 10^9 bytes as printed.
FIGURE_1 = {0: "120", 1: "31.4", 2: "16.6", 3: "1.88"}

# Table 1: (billions of parameters, ranks) to the printed GB of stages 1, 2, 3.
TABLE_1 = {
    (7.5, 1): ("120", "120", "120"),
    (7.5, 4): ("52.5", "41.3", "30"),
    (7.5, 16): ("35.6", "21.6", "7.5"),
    (128, 1): ("2048", "2048", "2048"),
    (128, 4): ("896", "704", "512"),
    (128, 16): ("608", "368", "128"),
    (1000, 1): ("16000", "16000", "16000"),
    (1000, 4): ("7000", "5500", "4000"),
    (1000, 16): ("4750", "2875", "1000"),
}
# A vector is rounded up to the allocator's 2 MiB, in each of five state tensors.
ROUNDING_GB = 5 * 2 * 2**20 / GB


def half_a_digit(printed: str) -> float:
    """Half a unit of the last printed digit: what rounding may hide."""
    return 0.5 * 10 ** -len(printed.partition(".")[2])


def total_gb(billions: float, ranks: int, stage: int) -> float:
    states = zero_state_bytes(one_vector(int(billions * BILLION)), ranks=ranks, stage=stage)
    return sum(states.values()) / GB


@pytest.mark.parametrize("stage", FIGURE_1)
def test_figure_1(stage: int) -> None:
    printed = FIGURE_1[stage]
    assert total_gb(7.5, 64, stage) == pytest.approx(float(printed), abs=half_a_digit(printed) + ROUNDING_GB)


@pytest.mark.parametrize(("billions", "ranks"), TABLE_1)
def test_table_1(billions: float, ranks: int) -> None:
    for stage, printed in zip((1, 2, 3), TABLE_1[billions, ranks], strict=True):
        assert total_gb(billions, ranks, stage) == pytest.approx(
            float(printed), abs=half_a_digit(printed) + ROUNDING_GB
        ), (stage, printed)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_no_stage_loses_or_invents_states(ranks: int) -> None:
    """What the ranks hold together is one model, and for what is not divided one model a rank."""
    parameters = 3 * BILLION
    whole = {"weights": 2, "gradients": 2, "master_weights": 4, "optimizer_states": 8}
    divided = {0: (), 1: ("master_weights", "optimizer_states")}
    divided[2] = (*divided[1], "gradients")
    divided[3] = (*divided[2], "weights")
    for stage, names in divided.items():
        states = zero_state_bytes(one_vector(parameters), ranks=ranks, stage=stage)
        for name, size in states.items():
            held = whole[name] * parameters / (ranks if name in names else 1)
            assert held <= size <= held + 2 * 2 * 2**20, (stage, name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_paper_s_states_are_those_of_an_answer(stage: int) -> None:
    """The same bytes stand in the answer to a whole plan, so the paper checks the answers and not a formula beside
    them. Gradients are left out: when they are allocated is a matter of the moment."""
    plan = {
        "model": "gpt2-medium",
        "precision": "fp16-mixed",
        "optimizer": "adam",
        "parallelism": {"zero": stage, "engine": "deepspeed" if stage else "ddp"},
        "hardware": {"gpu": "v100-sxm2-32gb", "gpus_per_node": 8},
        "data": {"sequence_length": 512},
    }
    steady = planner.estimate(plan).to_dict()["memory"]["breakdowns"]["steady"]
    tensors = state_tensors(load_model("gpt2-medium"), Method(), MIXED_PRECISION_ADAM)
    states = zero_state_bytes(tensors, ranks=8, stage=stage)
    for name in ("weights", "master_weights", "optimizer_states"):
        assert steady[name] == states[name], name

"""torchtune's ladder of memory flags on Llama-3.2-3B, one A100, two packed sequences of 4096: all six packed rungs.

torchtune README.md at 1814feb17, Optimization flags: peaks of active bytes, printed to 0.1 GiB. The table does not name
the optimizer's implementation; recipes/configs/llama3_2/3B_full.yaml steps torch's fused AdamW, and so do these plans
(with foreach the third rung would read 29.9). Compiled rungs run the eager blocks in the ledger.
"""

from __future__ import annotations

from typing import Any

import pytest

import planner
from planner.ledger.fused_loss import compiled_cross_entropy
from planner.ledger.operations import Operations

COMPILED: dict[str, Any] = {"implementation": {"name": "torchtune", "compiled": True}}
CHUNKED = {**COMPILED, "recompute": "full", "loss": "chunked"}
OFFLOADED = {**CHUNKED, "offload": "activations"}
FUSED = {"name": "adamw", "implementation": "fused"}
LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"name": "lora", "rank": 64, "targets": LINEARS, "adapter_dtype": "bf16"}
# Published GiB, our error as it stands, the plan. Errors beyond 3 % are misses.
RUNGS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "packed": (60.0, -0.002, {"implementation": "torchtune", "optimizer": FUSED}),
    "compiled": (51.0, 0.174, {**COMPILED, "optimizer": FUSED}),  # a miss: what is fused inside blocks is not known
    "chunked loss, recomputed": (24.9, 0.013, {**CHUNKED, "optimizer": FUSED}),
    "offloaded, in backward": (21.8, 0.002, {**OFFLOADED, "optimizer": {**FUSED, "in_backward": True}}),
    # a miss; cause not known
    "8-bit states": (17.6, -0.094, {**OFFLOADED, "optimizer": {"name": "adamw-8bit", "in_backward": True}}),
    # a miss; cause not known
    "LoRA": (8.5, 0.099, {**OFFLOADED, "method": LORA}),
}


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_is_as_far_off_as_it_says(rung: str) -> None:
    published, error, plan = RUNGS[rung]
    answer = planner.estimate(
        {
            "model": "meta-llama/Llama-3.2-3B",
            "data": {"sequence_length": 4096, "micro_batch_size": 2},
            "hardware": {"gpu": "a100-sxm-80gb"},
            **plan,
        }
    )
    predicted = answer.to_dict()["memory"]["peak_allocated"] / 2**30
    print(f"{rung}: {predicted:.2f} GiB, {predicted / published:.4f} of the published {published}")
    assert predicted / published - 1 == pytest.approx(error, abs=0.004)


def test_a_compiled_loss_is_apples_measured_one() -> None:
    """Apple's CCE paper, Table 1, torch.compile: 4000 MiB for the loss, 16000 with its gradient; 8192 x 256000."""
    t = Operations(sizes={"N": 8192, "V": 256000})
    logits = t.constant("logits", ("N", "V"), "bf16")
    logits.requires_grad = True
    labels = t.constant("labels", ("N",), "int64")
    loss = compiled_cross_entropy(t, logits, labels)
    del logits
    forward = len(t.events)
    t.backward(loss)
    level, levels = 0, []
    for event in t.events:
        level += (1 if event > 0 else -1) * t.rows[abs(event) - 1].size
        levels.append(level / 2**20)
    print(f"loss {levels[forward - 1]:.1f} MiB, with gradient {max(levels):.1f} MiB")
    assert levels[forward - 1] == pytest.approx(4000, abs=1)
    assert max(levels) == pytest.approx(16000, abs=1)


def test_a_compiled_loss_keeps_sixteen_bit_logits_instead_of_an_fp32_softmax() -> None:
    plans = [
        {"model": "Llama-3.2-3B", "implementation": implementation, "loss": "chunked", "recompute": "full"}
        for implementation in ("torchtune", COMPILED["implementation"])
    ]
    eager, compiled = (planner.estimate(plan).to_dict()["memory"]["breakdowns"]["forward_end"] for plan in plans)
    saved = eager["logits_and_loss"] - compiled["logits_and_loss"]
    assert saved == pytest.approx((4 - 2) * 2048 * 128256, rel=0.01)

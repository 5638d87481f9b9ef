"""One rank's share of a model."""

from __future__ import annotations

import pytest

import planner
from planner.errors import PlanError
from planner.ledger.weights import parameter_counts
from planner.model.tensor_parallel import local_shape


def test_degree_one_is_the_model_itself() -> None:
    shape = planner.load_model("Llama-3.1-8B")
    assert local_shape(shape, 1) is shape


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_the_shares_add_up(tensor: int) -> None:
    """Every matrix is divided; norms are whole on each rank."""
    whole = parameter_counts(planner.load_model("Llama-3.1-8B"))
    share = parameter_counts(local_shape(planner.load_model("Llama-3.1-8B"), tensor))
    assert share["norm"] == whole["norm"]
    for component in ("attention", "mlp_dense", "embed_in", "lm_head"):
        assert share[component] * tensor == whole[component]


def test_key_value_heads_are_repeated_beyond_their_number() -> None:
    shape = local_shape(planner.load_model("Qwen2.5-1.5B"), 4)  # 12 query heads, 2 key/value heads
    assert shape.blocks[0].mixer.kv_heads == 1  # type: ignore[union-attr]


def test_a_degree_that_does_not_divide() -> None:
    with pytest.raises(PlanError, match="does not divide"):
        local_shape(planner.load_model("gpt2"), 5)

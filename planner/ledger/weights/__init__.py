"""Which parameter tensors a model owns: one file for each kind of layer, and the model as a whole."""

from planner.ledger.weights.embedding import embedding_weights
from planner.ledger.weights.loss_head import head_weights
from planner.ledger.weights.model import (
    WeightGroup,
    active_parameters,
    block_weights,
    ffn_weights,
    mixer_weights,
    model_weights,
    named_weights,
    parameter_counts,
    tower_weights,
)

__all__ = [
    "WeightGroup",
    "active_parameters",
    "block_weights",
    "embedding_weights",
    "ffn_weights",
    "head_weights",
    "mixer_weights",
    "model_weights",
    "named_weights",
    "parameter_counts",
    "tower_weights",
]

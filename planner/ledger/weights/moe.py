"""Weights of routed feed-forward layers: router, experts, shared experts.

Letters: X experts, F width of one expert, H hidden.
"""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.mlp import mlp_weights
from planner.model.shape import Moe, Weight

__all__ = ["moe_weights"]


def moe_weights(moe: Moe, hidden: int) -> tuple[Weight, ...]:
    """The router (X, H), the experts, stacked as (X, 2F, H) and (X, H, F) or one by one, and what is shared."""
    m = moe
    weights = linear_weights(m.router_name, m.experts, hidden, bias=m.router_bias, component="router")
    if m.score_bias:
        name = m.score_bias_name or f"{m.router_name}.e_score_correction_bias"
        weights += (Weight(name=name, shape=(m.experts,), component="router", kind="bias"),)
    width_in = m.width * (2 if m.gated else 1)
    expert_hidden = m.latent or hidden
    if m.stacked:
        *inputs, last = (f"{m.experts_name}.{name}" for name in m.expert_names)
        rows = width_in // len(inputs)
        tensors: list[tuple[str, tuple[int, ...]]] = [(name, (m.experts, rows, expert_hidden)) for name in inputs]
        tensors.append((last, (m.experts, expert_hidden, m.width)))
        if m.layout == "in-out":
            tensors = [(name, (sizes[0], sizes[2], sizes[1])) for name, sizes in tensors]
        if m.layout == "rows":
            tensors = [(name, (m.experts * rows, expert_hidden)) for name in inputs]
            tensors.append((last, (m.experts * m.width, expert_hidden)))
        weights += tuple(
            Weight(
                name=name,
                shape=shape,
                component="experts_routed",
                kind="experts",
            )
            for name, shape in tensors
        )
        if m.expert_bias:
            for name, size in [*((name, rows) for name in inputs), (last, expert_hidden)]:
                shape = (m.experts, size)
                weights += (Weight(name=f"{name}_bias", shape=shape, component="experts_routed", kind="bias"),)
    else:
        for expert in range(m.experts):
            name = f"{m.experts_name}.{expert}"
            *inputs, last = m.expert_names
            rows = width_in // len(inputs)
            for part in inputs:
                weights += linear_weights(
                    f"{name}.{part}", rows, expert_hidden, bias=m.expert_bias, component="experts_routed"
                )
            weights += linear_weights(
                f"{name}.{last}", expert_hidden, m.width, bias=m.expert_bias, component="experts_routed"
            )
    if m.latent:
        down, up = m.latent_names
        weights += linear_weights(down, m.latent, hidden, bias=m.latent_bias, component="experts_shared")
        weights += linear_weights(up, hidden, m.latent, bias=m.latent_bias, component="experts_shared")
    if m.shared is not None:
        weights += mlp_weights(m.shared, hidden, "experts_shared")
    if m.shared_gate is not None:
        weights += linear_weights(m.shared_gate, 1, hidden, bias=False, component="experts_shared")
    return weights

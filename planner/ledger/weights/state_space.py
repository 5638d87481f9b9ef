"""Weights of recurrent mixers: Mamba 1, Mamba 2 and the gated delta rule.

Letters: H hidden, I inner width, N state size, G groups.
"""

from __future__ import annotations

from planner.ledger.weights.linear import linear_weights
from planner.ledger.weights.norm import norm_weights
from planner.model.shape import GatedDeltaNet, Mamba1, Mamba2, Norm, Weight

__all__ = ["gated_delta_net_weights", "mamba1_weights", "mamba2_weights"]


def _convolution(name: str, channels: int, width: int, bias: bool) -> tuple[Weight, ...]:
    """A depthwise causal convolution: one filter for each channel."""
    weights = (Weight(name=f"{name}.weight", shape=(channels, 1, width), component="ssm", kind="conv"),)
    if bias:
        weights += (Weight(name=f"{name}.bias", shape=(channels,), component="ssm", kind="bias"),)
    return weights


def _vector(name: str, *shape: int) -> tuple[Weight, ...]:
    return (Weight(name=name, shape=shape, component="ssm", kind="other"),)


def mamba1_weights(mixer: Mamba1, hidden: int) -> tuple[Weight, ...]:
    """in_proj (2I, H), the convolution, x_proj (dt_rank + 2N, I), dt_proj, A (I, N), D (I), out_proj (H, I).

    Mamba (arXiv:2312.00752), algorithm 2 and section 3.4.
    """
    m, name = mixer, mixer.name
    weights = linear_weights(f"{name}.in_proj", 2 * m.inner, hidden, bias=m.proj_bias, component="ssm")
    weights += _convolution(f"{name}.conv1d", m.inner, m.conv, m.conv_bias)
    weights += linear_weights(f"{name}.x_proj", m.dt_rank + 2 * m.state, m.inner, bias=False, component="ssm")
    weights += linear_weights(f"{name}.dt_proj", m.inner, m.dt_rank, bias=True, component="ssm")
    weights += _vector(f"{name}.A_log", m.inner, m.state) + _vector(f"{name}.D", m.inner)
    weights += linear_weights(f"{name}.out_proj", hidden, m.inner, bias=m.proj_bias, component="ssm")
    if m.norms == "weighted":
        norm = Norm(kind="rmsnorm")
        weights += norm_weights(norm, f"{name}.dt_layernorm", m.dt_rank)
        weights += norm_weights(norm, f"{name}.b_layernorm", m.state)
        weights += norm_weights(norm, f"{name}.c_layernorm", m.state)
    return weights


def mamba2_weights(mixer: Mamba2, hidden: int) -> tuple[Weight, ...]:
    """in_proj (2I + 2GN + heads, H), the convolution over I + 2GN channels, dt, A, D by head, norm (I), out_proj.

    Mamba 2 (arXiv:2405.21060), section 7.1.
    """
    m, name = mixer, mixer.name
    channels = m.inner + 2 * m.groups * m.state
    weights = linear_weights(f"{name}.in_proj", m.inner + channels + m.heads, hidden, bias=m.proj_bias, component="ssm")
    weights += _convolution(f"{name}.conv1d", channels, m.conv, m.conv_bias)
    weights += _vector(f"{name}.dt_bias", m.heads) + _vector(f"{name}.A_log", m.heads) + _vector(f"{name}.D", m.heads)
    weights += norm_weights(Norm(kind="rmsnorm"), f"{name}.norm", m.inner)
    return weights + linear_weights(f"{name}.out_proj", hidden, m.inner, bias=m.proj_bias, component="ssm")


def gated_delta_net_weights(mixer: GatedDeltaNet, hidden: int) -> tuple[Weight, ...]:
    """Projections to q, k, v, the output gate z and the scalars b and a; the convolution over q, k, v; norm; out_proj.

    Gated DeltaNet (arXiv:2412.06464), section 3.3.
    """
    m, name = mixer, mixer.name
    keys, values = m.key_heads * m.key_dim, m.value_heads * m.value_dim
    if m.projections == "fused":
        parts = [("in_proj_qkvz", 2 * keys + 2 * values), ("in_proj_ba", 2 * m.value_heads)]
    else:
        parts = [("in_proj_qkv", 2 * keys + values), ("in_proj_z", values)]
        parts += [("in_proj_b", m.value_heads), ("in_proj_a", m.value_heads)]
    weights: tuple[Weight, ...] = ()
    for part, rows in parts:
        weights += linear_weights(f"{name}.{part}", rows, hidden, bias=False, component="ssm")
    weights += _convolution(f"{name}.conv1d", 2 * keys + values, m.conv, False)
    weights += _vector(f"{name}.dt_bias", m.value_heads) + _vector(f"{name}.A_log", m.value_heads)
    weights += norm_weights(Norm(kind="rmsnorm"), f"{name}.norm", m.value_dim)
    return weights + linear_weights(f"{name}.out_proj", hidden, values, bias=False, component="ssm")

"""One residual block, by its kind of residual stream."""

from __future__ import annotations

from planner.errors import NotCovered
from planner.ledger.attention import attend
from planner.ledger.mlp import feed_forward
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, Mlp, Mixer, Moe

__all__ = ["run_block"]


def run_block(t: Operations, block: Block, x: Tensor) -> Tensor:
    """The block's output for input x, (B, S, H)."""
    return _RESIDUALS[block.residual](t, block, x)


def mix(t: Operations, mixer: Mixer | None, x: Tensor) -> Tensor:
    """The token mixer's branch."""
    if isinstance(mixer, Attention):
        return attend(t, mixer, x, x.dims[-1])
    raise NotCovered(f"activations of {type(mixer).__name__} are not in the ledger.")


def transform(t: Operations, ffn: Mlp | Moe | None, x: Tensor) -> Tensor:
    """The feed-forward branch."""
    if isinstance(ffn, Mlp):
        return feed_forward(t, ffn, x, x.dims[-1])
    raise NotCovered(f"activations of {type(ffn).__name__} are not in the ledger.")


def _sequential(t: Operations, block: Block, x: Tensor) -> Tensor:
    residual = x
    x = normalise(t, block.norm, block.norm_names[0], x)
    x = mix(t, block.mixer, x)
    x = t.dropout(x, block.dropout)
    x = t.add(residual, x)
    residual = x
    x = normalise(t, block.norm, block.norm_names[1], x)
    x = transform(t, block.ffn, x)
    x = t.dropout(x, block.dropout)
    return t.add(residual, x)


_RESIDUALS = {"sequential": _sequential}

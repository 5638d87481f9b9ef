"""All weights of a model, grouped so that equal blocks are counted once, and the counts people quote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from planner.ledger.weights.attention import attention_weights, latent_attention_weights
from planner.ledger.weights.embedding import embedding_weights
from planner.ledger.weights.loss_head import head_weights
from planner.ledger.weights.mlp import mlp_weights
from planner.ledger.weights.moe import moe_weights
from planner.ledger.weights.norm import norm_weights
from planner.ledger.weights.state_space import (
    gated_delta_net_weights,
    mamba1_weights,
    mamba2_weights,
)
from planner.model.shape import (
    Attention,
    Block,
    Component,
    GatedDeltaNet,
    LatentAttention,
    Mamba1,
    Mamba2,
    Mixer,
    Mlp,
    ModelShape,
    Moe,
    Tower,
    Weight,
)

__all__ = [
    "WeightGroup",
    "active_parameters",
    "block_weights",
    "ffn_weights",
    "mixer_weights",
    "model_weights",
    "named_weights",
    "parameter_counts",
    "tower_weights",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """The weights of one module, or of all the equal blocks of a stack.

    prefix: the module path before each name. layers: the indices of the blocks that own a copy; empty for what
    exists once.
    """

    prefix: str
    layers: tuple[int, ...]
    weights: tuple[Weight, ...]

    @property
    def repeat(self) -> int:
        """How many copies exist."""
        return len(self.layers) or 1

    @property
    def count(self) -> int:
        """Number of elements, all copies together."""
        return self.repeat * sum(weight.count for weight in self.weights)


def mixer_weights(mixer: Mixer | None, hidden: int) -> tuple[Weight, ...]:
    """The weights of the part of a block that mixes positions."""
    match mixer:
        case None:
            return ()
        case Attention():
            return attention_weights(mixer, hidden)
        case LatentAttention():
            return latent_attention_weights(mixer, hidden)
        case Mamba1():
            return mamba1_weights(mixer, hidden)
        case Mamba2():
            return mamba2_weights(mixer, hidden)
        case GatedDeltaNet():
            return gated_delta_net_weights(mixer, hidden)


def ffn_weights(ffn: Mlp | Moe | None, hidden: int) -> tuple[Weight, ...]:
    """The weights of the feed-forward part of a block."""
    match ffn:
        case None:
            return ()
        case Mlp():
            return mlp_weights(ffn, hidden)
        case Moe():
            return moe_weights(ffn, hidden)


@lru_cache(maxsize=1024)
def block_weights(block: Block, hidden: int) -> tuple[Weight, ...]:
    """Every parameter of one block, named relative to it; each name in `norm_names` and `post_norm_names` is a norm."""
    weights = mixer_weights(block.mixer, hidden)
    if block.cross is not None:
        weights += attention_weights(block.cross, hidden)
    weights += ffn_weights(block.ffn, hidden)
    names = block.norm_names + block.post_norm_names + ((block.cross_norm_name,) if block.cross_norm_name else ())
    for name in names:
        weights += norm_weights(block.norm, name, hidden)
    return weights + block.extra


def _stack(blocks: tuple[Block, ...], hidden: int, prefix: str) -> tuple[WeightGroup, ...]:
    """One group for each distinct block, in order of first appearance."""
    layers_of_object: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):  # by identity first: hashing a block costs far more than looking at it
        layers_of_object.setdefault(id(block), []).append(index)
    layers_of: dict[Block, list[int]] = {}
    for layers in layers_of_object.values():
        layers_of.setdefault(blocks[layers[0]], []).extend(layers)
    return tuple(
        WeightGroup(prefix=prefix, layers=tuple(sorted(layers)), weights=block_weights(block, hidden))
        for block, layers in layers_of.items()
    )


def tower_weights(tower: Tower) -> tuple[WeightGroup, ...]:
    """The weights of a further stack; those of a vision or audio tower all count as `vision_or_audio`."""
    once = embedding_weights(tower.embedding)
    once += norm_weights(tower.final_norm, tower.final_norm_name, tower.hidden) + tower.extra
    groups = (WeightGroup(prefix="", layers=(), weights=once), *_stack(tower.blocks, tower.hidden, tower.name))
    if tower.role not in ("vision", "audio"):
        return groups
    return tuple(
        replace(group, weights=tuple(replace(weight, component="vision_or_audio") for weight in group.weights))
        for group in groups
    )


def model_weights(shape: ModelShape) -> tuple[WeightGroup, ...]:
    """Every parameter of the model once; tied tables appear under their first name only."""
    groups = (
        WeightGroup(prefix="", layers=(), weights=embedding_weights(shape.embedding)),
        *_stack(shape.blocks, shape.hidden, shape.prefix),
        WeightGroup(prefix="", layers=(), weights=head_weights(shape.head, shape.hidden) + shape.extra),
    )
    for tower in shape.towers:
        groups += tower_weights(tower)
    return tuple(group for group in groups if group.weights)


def named_weights(shape: ModelShape) -> Iterator[tuple[str, Weight]]:
    """Every parameter with its full path, as the reference implementation names it."""
    for group in model_weights(shape):
        for layer in group.layers or (None,):
            prefix = group.prefix if layer is None else f"{group.prefix}.{layer}"
            for weight in group.weights:
                yield (f"{prefix}.{weight.name}" if prefix else weight.name), weight


def parameter_counts(shape: ModelShape) -> dict[str, int]:
    """Unique parameters by component, and their `total`. Tied tables count once, as `embed_in`."""
    counts: dict[str, int] = dict.fromkeys(get_args(Component), 0)
    for group in model_weights(shape):
        for weight in group.weights:
            counts[weight.component] += group.repeat * weight.count
    counts["total"] = sum(counts.values())
    return counts


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token meets: all but the routed experts that it is not sent to.

    Both embedding tables count, unlike in some vendors' figures.
    """
    total = parameter_counts(shape)["total"]
    for block in shape.blocks:
        if isinstance(block.ffn, Moe):
            routed = sum(
                weight.count for weight in block_weights(block, shape.hidden) if weight.component == "experts_routed"
            )
            total -= routed // block.ffn.experts * (block.ffn.experts - block.ffn.top_k)
    return total

"""Which modules an adapter goes to when a plan does not say.

peft/utils/constants.py lists modules by model type; read as a rule, LoRA takes the query and value projections (or the
fused one), and (IA)^3 the keys, the values and the feed-forward input of its last product (arXiv:2205.05638). Two
types differ from the rule in that list and are named here.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.errors import PlanError
from planner.model.shape import Attention, Block, LatentAttention, Mlp, ModelShape
from planner.plan import Method

__all__ = ["default_targets"]

_LORA_EXCEPTIONS = {
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def default_targets(shape: ModelShape, method: Method) -> tuple[str, ...]:
    """Module names for lora, qlora or ia3 on this model. Raises PlanError when there is no module to adapt."""
    if method.name in ("lora", "qlora") and shape.model_type in _LORA_EXCEPTIONS:
        return _LORA_EXCEPTIONS[shape.model_type]
    stacks = [shape.blocks, *(tower.blocks for tower in shape.towers if tower.role == "encoder")]
    blocks = {id(block): block for stack in stacks for block in stack}.values()
    names = dict.fromkeys(name for block in blocks for name in _names(block, method))
    if not names:
        raise PlanError(f'{method.name} has no default targets for "{shape.model_type}"; name them in method.targets.')
    return tuple(names)


def _names(block: Block, method: Method) -> Iterator[str]:
    for attention in (block.mixer, block.cross):
        if isinstance(attention, Attention):
            projections = [name.rpartition(".")[2] for name in attention.names]
            if method.name == "ia3":
                yield from projections[1:] or projections
            else:
                yield from (projections[0], projections[-1]) if len(projections) > 1 else projections
        elif isinstance(attention, LatentAttention):
            yield from ("q_proj" if attention.q_rank is None else "q_b_proj", "kv_b_proj")
    if method.name == "ia3" and isinstance(block.ffn, Mlp):
        yield block.ffn.names[-1].rpartition(".")[2]

"""What one rank of a tensor-parallel group holds of a model (Megatron-LM's split, arXiv:1909.08053 section 3).

Column-parallel: query, key, value, gate and up projections, split by heads and by width. Row-parallel: output and down
projections, split by the same along their input. Tables of the vocabulary are split by rows. Norms, the biases of
row-parallel layers and learned positions are whole on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from planner.errors import NotCovered, PlanError
from planner.model.shape import Attention, Block, Mlp, ModelShape

__all__ = ["local_shape"]


@lru_cache(maxsize=64)
def local_shape(shape: ModelShape, tensor: int) -> ModelShape:
    """The shape of one of `tensor` ranks. Raises PlanError when heads do not divide, NotCovered for other layers.

    Fewer key/value heads than ranks are repeated: every rank holds at least one.
    """
    if tensor == 1:
        return shape
    if shape.towers:
        raise NotCovered(f"tensor parallelism of a model with further towers ({shape.model_type}) is not covered.")
    known: dict[int, Block] = {}
    for block in shape.blocks:
        if id(block) not in known:
            known[id(block)] = _local_block(block, tensor)
    embedding, head = shape.embedding, shape.head
    return replace(
        shape,
        blocks=tuple(known[id(block)] for block in shape.blocks),
        embedding=replace(embedding, rows=-(-embedding.rows // tensor)) if embedding is not None else None,
        head=replace(head, rows=-(-head.rows // tensor)) if head is not None else None,
    )


def _local_block(block: Block, tensor: int) -> Block:
    mixer, ffn = block.mixer, block.ffn
    if not isinstance(mixer, Attention) or not isinstance(ffn, Mlp) or block.cross is not None or block.extra:
        kind = type(mixer).__name__ if not isinstance(mixer, Attention) else type(ffn).__name__
        raise NotCovered(f"tensor parallelism of {kind} layers is not covered.")
    for name, size in (("attention heads", mixer.heads), ("feed-forward width", ffn.width)):
        if size % tensor:
            raise PlanError(f"parallelism.tensor = {tensor} does not divide the model's {size} {name}.")
    return replace(
        block,
        mixer=replace(
            mixer, heads=mixer.heads // tensor, kv_heads=max(mixer.kv_heads // tensor, 1), out_size=mixer.out_size
        ),
        ffn=replace(ffn, width=ffn.width // tensor),
    )

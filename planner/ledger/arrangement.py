"""How an implementation arranges a model that it did not define: its modules, their names, its adapters' formats.

Shapes are read from Hugging Face configurations. An implementation with model code of its own builds the same layers
from modules of its own; what that changes of weights and names is put right here, before anything is counted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache

from planner.errors import NotCovered
from planner.ledger.profile import Profile
from planner.ledger.targets import linear_modules
from planner.model.shape import Attention, Block, Mlp, ModelShape, Moe
from planner.plan import Method, Precision

__all__ = ["arranged", "settled"]

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# litgpt's switches (lora_query, ...; finetune/lora.py) and the names that other libraries give to the same linears.
_LITGPT_TARGETS = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "projection": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("lm_head",),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "out_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("up_proj",),
    "dense_4h_to_h": ("down_proj",),
    "fc1": ("up_proj",),
    "fc2": ("down_proj",),
}
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@lru_cache(maxsize=256)
def arranged(shape: ModelShape, profile: Profile) -> ModelShape:
    """The model as the implementation builds it.

    litgpt (model.py): one fused qkv projection, whatever the original has, an output projection that never shares the
        embedding's weights, linears named alike in every model. Here its q, k and v keep names of their own, as its
        LoRA addresses them one by one. Raises NotCovered for layers that it does not have.
    transformers before 5: each expert is a module with linears of its own.
    """
    if profile.name == "litgpt":
        return _litgpt(shape)
    if profile.name == "transformers" and profile.expert_modules:
        return replace(shape, blocks=tuple(_expert_modules(block) for block in shape.blocks))
    return shape


def settled(method: Method, precision: Precision, profile: Profile, shape: ModelShape) -> Method:
    """The method with what the implementation decides: adapter formats, names of targets, what 4-bit weights are.

    shape: as the implementation arranges it, for the targets that a group name stands for.
    """
    if not profile.adapters_follow_weights:
        return method
    targets = method.targets
    if profile.name == "litgpt" and method.name in ("lora", "qlora"):
        modules = {module.rpartition(".")[2] for module in linear_modules(shape)}
        targets = tuple(part for name in targets or ("query", "value") for part in _litgpt_targets(name, modules))
    quantizes_head = method.quantizes_head or profile.name == "litgpt"
    return replace(
        method, adapter_dtype=precision.weights, targets=targets, upcast=False, quantizes_head=quantizes_head
    )


def _litgpt_targets(name: str, modules: Collection[str]) -> tuple[str, ...]:
    """The linears that a name of litgpt's own, or of another library, stands for."""
    group = _ALL_LINEAR if name == "all-linear" else _LITGPT_TARGETS.get(name)
    return (name,) if group is None else tuple(part for part in group if part in modules)


def _litgpt(shape: ModelShape) -> ModelShape:
    if shape.towers or shape.head is None or shape.embedding is None or shape.embedding.positions:
        raise NotCovered(f'litgpt has no model of the kind "{shape.model_type}".')
    kinds: dict[int, Block] = {}
    for block in shape.blocks:
        if id(block) not in kinds:
            kinds[id(block)] = _litgpt_block(block)
    head = replace(shape.head, tied=False, name="lm_head", scaled=False)
    return replace(shape, blocks=tuple(kinds[id(block)] for block in shape.blocks), head=head)


def _litgpt_block(block: Block) -> Block:
    mixer, ffn = block.mixer, block.ffn
    if not isinstance(mixer, Attention) or not isinstance(ffn, Mlp):
        raise NotCovered("litgpt's ledger covers dense attention and feed-forward layers only.")
    if block.residual not in ("sequential", "parallel", "sandwich") or mixer.qk_norm is not None:
        raise NotCovered(f"litgpt's ledger does not cover {block.residual} residuals with these norms.")
    mixer = replace(mixer, names=_PROJECTIONS, out_name="self_attn.o_proj", dropout=0.0, window=None)
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") if ffn.gated else ("mlp.up_proj", "mlp.down_proj")
    activation = "gelu" if ffn.activation.startswith("gelu") else ffn.activation  # F.gelu(x, approximate=...)
    return replace(block, mixer=mixer, ffn=replace(ffn, names=names, activation=activation, dropout=0.0), dropout=0.0)


def _expert_modules(block: Block) -> Block:
    if not isinstance(block.ffn, Moe) or not block.ffn.stacked or block.ffn.layout != "out-in":
        return block
    names = ("w1", "w3", "w2") if block.ffn.routing == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    return replace(block, ffn=replace(block.ffn, stacked=False, expert_names=names))

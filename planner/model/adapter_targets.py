"""Which modules an adapter goes to when a plan does not say.

peft/utils/constants.py lists modules by model type; read as a rule, LoRA takes the query and value projections (or the
fused one), and (IA)^3 the keys, the values and the feed-forward input of its last product (arXiv:2205.05638). Types
that differ from the rule in that list are named here; so are the types that it lists at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.errors import PlanError
from planner.model.shape import Attention, Block, LatentAttention, Mlp, ModelShape
from planner.plan import Method

__all__ = ["chosen_by", "default_targets"]

_LORA_EXCEPTIONS = {
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
_QUERY_VALUE_DOWN = ("q_proj", "v_proj", "down_proj")
_IA3_EXCEPTIONS = {
    **dict.fromkeys(("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "llama4"), _QUERY_VALUE_DOWN),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "bart": ("q_proj", "v_proj", "fc2"),
    "bert": ("key", "value", "output.dense"),
    "roberta": ("key", "value", "output.dense"),
}
_LISTED_FOR_BOTH = frozenset(
    {
        "bart", "bert", "bloom", "deberta", "deberta-v2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2",
        "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "llama", "llama4", "mistral", "mt5", "opt", "phi", "qwen2",
        "qwen3", "roberta", "t5",
    }
)  # fmt: skip
_LISTED = {
    "ia3": _LISTED_FOR_BOTH | {"mixtral"},
    "lora": _LISTED_FOR_BOTH
    | {"chatglm", "codegen", "electra", "gemma4", "mpt", "nemotron_h", "stablelm", "xlm-roberta"},
}


def default_targets(shape: ModelShape, method: Method) -> tuple[str, ...]:
    """Module names for lora, qlora or ia3 on this model. Raises PlanError when there is no module to adapt."""
    exceptions = _IA3_EXCEPTIONS if method.name == "ia3" else _LORA_EXCEPTIONS
    if shape.model_type in exceptions:
        return exceptions[shape.model_type]
    stacks = [shape.blocks, *(tower.blocks for tower in shape.towers if tower.role == "encoder")]
    blocks = {id(block): block for stack in stacks for block in stack}.values()
    names = dict.fromkeys(name for block in blocks for name in _names(block, method))
    if not names:
        raise PlanError(f'{method.name} has no default targets for "{shape.model_type}"; name them in method.targets.')
    return tuple(names)


def chosen_by(shape: ModelShape, method: Method) -> str:
    """Whose choice `default_targets` is, as the end of a sentence: peft's, or the rule where peft has none."""
    if shape.model_type in _LISTED["ia3" if method.name == "ia3" else "lora"]:
        return "as peft chooses by default"
    what = "keys, values and the feed-forward's last product" if method.name == "ia3" else "queries and values"
    return f"the {what}; peft has no default for {shape.model_type}"


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
        last = block.ffn.names[-1]
        leaf = last.rpartition(".")[2]
        shared = isinstance(block.mixer, Attention) and block.mixer.out_name.rpartition(".")[2] == leaf
        yield last if shared else leaf  # GPT-2 calls both its last products c_proj

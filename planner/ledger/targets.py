"""What a training method can be applied to: targets that exist, and combinations that the ledger describes.

A target that matches no module is an error here. peft raises only when none of the targets matches, and then trains
fewer weights than the plan says.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.errors import NotCovered, PlanError, nearest
from planner.ledger.profile import Profile
from planner.ledger.weights import model_weights
from planner.model.shape import Attention, ModelShape, Moe, Weight
from planner.plan import Method

__all__ = ["check_method", "check_targets", "is_linear", "linear_modules"]

# Routers that are an nn.Linear in transformers 5; elsewhere a module of its own holds the matrix as a bare parameter,
# which neither all-linear nor 4-bit loading reaches. Read off the classes of transformers 5.23.
_LINEAR_ROUTERS = frozenset({"phimoe", "dbrx", "llama4_text"})

# Families whose experts transformers 5 stacks and for which peft 0.21 turns targets that were linears before into
# adapters on the stacked parameters (peft/utils/transformers_weight_conversion.py), and those targets.
_CONVERTED = frozenset(
    {
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
        "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "kimi_k2",
        "longcat_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next",
        "qwen3_omni_moe_text", "solar_open",
    }
)  # fmt: skip
_ON_EXPERTS = frozenset({"all-linear", "gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})

# tuners_utils.py, _check_lora_target_modules_mamba: the fused kernels of these read out_proj's weight for themselves.
_STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})

# Models whose key/value heads peft does not find in the config: it makes a prefix for all query heads, which they
# cannot take (peft/utils/other.py, _prepare_prompt_learning_config).
_NO_PREFIX = frozenset({"falcon", "gpt_bigcode"})


def is_linear(weight: Weight, family: str) -> bool:
    """Whether the weight is the matrix of an nn.Linear (or Conv1D) of the reference model."""
    return weight.kind == "linear" and (weight.component != "router" or family in _LINEAR_ROUTERS)


def linear_modules(shape: ModelShape) -> Iterator[str]:
    """Paths of all linear modules, those of a block relative to it."""
    for group in model_weights(shape):
        for weight in group.weights:
            if is_linear(weight, shape.model_type):
                yield weight.name.rpartition(".")[0]


def check_targets(shape: ModelShape, method: Method) -> None:
    """Raise PlanError for a target that no module answers to, NotCovered for one that is not a linear."""
    if method.name not in ("lora", "qlora", "ia3"):
        return
    stacked = any(isinstance(block.ffn, Moe) and block.ffn.stacked for block in shape.blocks)
    modules = set(linear_modules(shape))
    for target in method.targets:
        leaf = target.rpartition(".")[2]
        if method.name != "ia3" and stacked and shape.model_type in _CONVERTED and leaf in _ON_EXPERTS:
            raise NotCovered(
                f'target "{target}" reaches the stacked experts of a {shape.model_type} model, where peft adapts whole '
                "parameters; that is not in the ledger. Name the attention projections instead."
            )
        if shape.model_type in _STATE_SPACE and (target == "all-linear" or leaf == "out_proj"):
            raise PlanError(f'peft refuses the target "{target}" on {shape.model_type} models: it reaches out_proj.')
        if target == "all-linear" or any(_answers(module, target) for module in modules):
            continue
        for group in model_weights(shape):
            for weight in group.weights:
                module = weight.name.removesuffix(".weight")
                if weight.kind in ("embedding", "experts") and _answers(module, target):
                    raise NotCovered(f'target "{target}" is no linear module; adapters on it are not in the ledger.')
        if shape.head is not None and shape.head.tied and _answers(shape.head.name, target):
            raise NotCovered(f'adapters on "{target}", which is tied to the embedding, are not in the ledger.')
        leaves = {module.rpartition(".")[2] for module in modules}
        known = nearest(target, leaves | {"all-linear"})
        raise PlanError(f'method.targets: no linear module of this {shape.model_type} is called "{target}"; {known}')


def _answers(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def check_method(shape: ModelShape, method: Method, profile: Profile, *, sharded: bool) -> None:
    """Raise NotCovered for a method on a model or in a setting where its activations are not in the ledger."""
    check_targets(shape, method)
    name, family = method.name, shape.model_type
    mixers = [block.mixer for block in shape.blocks]
    causal = all(not isinstance(mixer, Attention) or mixer.causal for mixer in mixers) and not shape.towers
    dora = method.dora and name in ("lora", "qlora")
    if (dora or name in ("ia3", "prefix", "prompt", "adapter")) and profile.name != "transformers":
        raise NotCovered(f"method {'dora' if dora else name} is covered for transformers, not for {profile.name}.")
    if name in ("prefix", "prompt", "adapter", "frozen") and not causal:
        raise NotCovered(f"method {name} is covered for decoders of text alone.")
    if name == "prefix" and (family in _NO_PREFIX or sharded):
        what = "with sharded parameters" if sharded else f"for {family} models, whose prefix peft makes too wide"
        raise NotCovered(f"method prefix is not covered {what}.")
    if name == "adapter" and family == "falcon":
        raise NotCovered("method adapter is not covered for falcon models, which add their branches to each other.")
    if method.train_embeddings and name == "qlora" and method.quantizes_head:
        raise NotCovered("a 4-bit output projection cannot train; leave out quantizes_head or train_embeddings.")
    if name == "frozen" and method.trainable_layers > len(shape.blocks):
        raise PlanError(
            f"method.trainable_layers is {method.trainable_layers}, but the model has {len(shape.blocks)} blocks."
        )

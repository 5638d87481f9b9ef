"""Fine-tuning methods in the ledger against the dry run of peft's own modules, and trainable counts against peft's.

Each case builds the real model on the meta device, applies the method to it (peft's configuration, frozen weights, or
the bottleneck network that the ledger describes) and replays a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.ledger.parameters import state_tensors
from planner.ledger.profile import profile_named
from planner.ledger.setting import Setting
from planner.ledger.step import record_step
from planner.memory.moments import pass_levels
from planner.model.adapter_targets import default_targets
from planner.plan import Method, Precision, Recompute
from planner.readers.hf_config import shape_from_config

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 0.002
BATCH, SEQUENCE = 4, 384
VIRTUAL = 20

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408, "vocab_size": 1000, "num_hidden_layers": 3, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
WIDE = {**LLAMA, "vocab_size": 32000}
TIED = {**LLAMA, "tie_word_embeddings": True}
BIASED = {**LLAMA, "attention_bias": True}
HEADS = {**LLAMA, "num_key_value_heads": 8}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 128}
MOE = {
    **LLAMA, "model_type": "qwen2_moe", "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512,
    "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": None, "sliding_window": None}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "intermediate_size": 2048, "vocab_size": 1000,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 512, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "n_positions": 1024,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Apply = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Variant:
    recompute: bool = False
    attention: str = "sdpa"
    dtype: str = "bf16"
    autocast: bool = False


PLAIN, CKPT, EAGER = Variant(), Variant(recompute=True), Variant(attention="eager")
FLASH, FP32 = Variant(attention="flash_attention_2"), Variant(dtype="fp32")
AMP = Variant(dtype="fp32", autocast=True)
AMP_CKPT = Variant(dtype="fp32", autocast=True, recompute=True)
EVERY = (PLAIN, CKPT, EAGER, FLASH, FP32, AMP, AMP_CKPT)


def lora(**settings: Any) -> tuple[Method, Apply]:
    targets = settings.pop("targets", ALL)
    method = Method(name="lora", rank=8, targets=targets if isinstance(targets, tuple) else (targets,), **settings)
    keywords: dict[str, Any] = {"use_dora": method.dora, "lora_dropout": method.dropout}
    if method.train_embeddings:
        keywords |= {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    named = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=8, target_modules=named, task_type="CAUSAL_LM", **keywords)
    return method, lambda model: peft.get_peft_model(model, config)


def ia3() -> tuple[Method, Apply]:
    config = peft.IA3Config(task_type="CAUSAL_LM")
    return Method(name="ia3"), lambda model: peft.get_peft_model(model, config)


def prompt() -> tuple[Method, Apply]:
    config = peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM")
    return Method(name="prompt", virtual_tokens=VIRTUAL), lambda model: peft.get_peft_model(model, config)


def prefix() -> tuple[Method, Apply]:
    config = peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM")
    return Method(name="prefix", virtual_tokens=VIRTUAL), lambda model: peft.get_peft_model(model, config)


def frozen(layers: int, *, embeddings: bool = False) -> tuple[Method, Apply]:
    def apply(model: Any) -> Any:
        model.requires_grad_(False)
        stack = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
        trained = [*list(stack)[len(stack) - layers :], model.get_output_embeddings()]
        for part in trained + [model.get_input_embeddings()] * embeddings:
            part.requires_grad_(True)
        return model

    return Method(name="frozen", trainable_layers=layers, train_embeddings=embeddings), apply


class Bottleneck(torch.nn.Module):
    """A branch of a block and the adapter at its end, as `planner.ledger.bottleneck` states it."""

    def __init__(self, branch: Any, hidden: int, width: int) -> None:
        super().__init__()
        self.branch = branch
        self.down = torch.nn.Linear(hidden, width)
        self.up = torch.nn.Linear(width, hidden)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.branch(*args, **kwargs)
        return (self.adapt(result[0]), *result[1:]) if isinstance(result, tuple) else self.adapt(result)

    def adapt(self, x: Any) -> Any:
        inner = torch.nn.functional.gelu(self.down(x.to(self.down.weight.dtype)))
        return x + self.up(inner).to(x.dtype)


def adapter(width: int = 64) -> tuple[Method, Apply]:
    def apply(model: Any) -> Any:
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn = Bottleneck(layer.self_attn, model.config.hidden_size, width)
            layer.mlp = Bottleneck(layer.mlp, model.config.hidden_size, width)
        return model

    return Method(name="adapter", bottleneck=width), apply


CASES: list[tuple[str, dict[str, Any], tuple[Method, Apply], tuple[Variant, ...]]] = [
    ("lora, dropout", LLAMA, lora(dropout=0.1), EVERY),
    ("lora, head", LLAMA, lora(targets=("q_proj", "lm_head")), (PLAIN, CKPT)),
    ("lora, embeddings", LLAMA, lora(targets=("q_proj",), train_embeddings=True), (PLAIN, CKPT, AMP)),
    ("lora, tied embeddings", TIED, lora(targets=("q_proj",), train_embeddings=True), (PLAIN, CKPT)),
    ("lora, fused projections", PHI3, lora(targets="all-linear"), (PLAIN, CKPT)),
    ("lora, conv1d", GPT2, lora(targets="all-linear", dropout=0.1), (PLAIN, CKPT)),
    ("lora, beside experts", MOE, lora(targets="all-linear"), (PLAIN, CKPT)),
    ("dora", LLAMA, lora(dora=True), EVERY),
    ("dora, dropout", LLAMA, lora(dora=True, dropout=0.1), (PLAIN, CKPT, AMP)),
    ("dora, biases", BIASED, lora(dora=True), (PLAIN, CKPT)),
    ("dora, wide vocabulary", WIDE, lora(dora=True), (PLAIN,)),
    ("dora, conv1d", GPT2, lora(targets="all-linear", dora=True), (PLAIN, CKPT)),
    ("ia3", LLAMA, ia3(), EVERY),
    ("ia3, wide vocabulary", WIDE, ia3(), (PLAIN, CKPT)),
    ("ia3, fused projection", NEOX, ia3(), (PLAIN, CKPT)),
    ("ia3, conv1d", GPT2, ia3(), (PLAIN, CKPT)),
    ("prompt", LLAMA, prompt(), EVERY),
    ("prompt, wide vocabulary", WIDE, prompt(), (PLAIN,)),
    ("prompt, learned positions", GPT2, prompt(), (PLAIN, CKPT)),
    ("prompt, parallel", NEOX, prompt(), (PLAIN, CKPT)),
    ("prefix", LLAMA, prefix(), (PLAIN, EAGER, FLASH, FP32, AMP)),
    ("prefix, no groups", HEADS, prefix(), (PLAIN, EAGER)),
    ("prefix, window", MISTRAL, prefix(), (PLAIN,)),
    ("prefix, learned positions", GPT2, prefix(), (PLAIN,)),
    ("frozen, head alone", LLAMA, frozen(0), (PLAIN, CKPT, AMP)),
    ("frozen, last", LLAMA, frozen(1), EVERY),
    ("frozen, last two", LLAMA, frozen(2), (PLAIN, CKPT)),
    ("frozen, tied", TIED, frozen(1), (PLAIN, CKPT)),
    ("frozen, embeddings", LLAMA, frozen(1, embeddings=True), (PLAIN, CKPT)),
    ("adapter", LLAMA, adapter(), EVERY),
]


def build(config: dict[str, Any], apply: Apply, variant: Variant) -> Callable[[], Any]:
    """The model with the method applied, to be called on the meta device; what it adds is made in fp32, as it is in
    a script whose default format is torch's own."""
    from planner.measure.transformers_edge import build_causal_lm

    def make() -> Any:
        model: Any = build_causal_lm(config)
        if variant.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        model = apply(model)
        torch.set_default_dtype(before)
        if hasattr(model, "prompt_tokens"):  # a plain attribute, which no device context may put on meta
            model.prompt_tokens = {name: torch.arange(VIRTUAL, device="cpu") for name in model.prompt_tokens}
        return model

    return make


def precision(variant: Variant) -> Precision:
    if variant.dtype == "bf16":
        return Precision()
    compute = "bf16" if variant.autocast else "fp32"
    return Precision(
        recipe="custom", weights="fp32", gradients="fp32", optimizer_states="fp32", compute=compute,
        autocast=variant.autocast,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "method", "apply", "variant"),
    [
        pytest.param(config, method, apply, variant, id=f"{name}-{variant}")
        for name, config, (method, apply), variants in CASES
        for variant in variants
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_moments_and_counts(config: dict[str, Any], method: Method, apply: Apply, variant: Variant) -> None:
    from planner.measure.dry_run import replay_training_step

    shape = shape_from_config(config)
    if method.name == "ia3":
        method = replace(method, targets=default_targets(shape, method))
    run = replay_training_step(
        build(config, apply, variant),
        micro_batch_size=BATCH,
        sequence_length=SEQUENCE,
        dtype=variant.dtype,
        attention=variant.attention,
        autocast="bf16" if variant.autocast else None,
    )
    tensors = state_tensors(shape, method, precision(variant))
    assert sum(t.repeat * t.elements for t in tensors if t.trainable) == run.trainable_parameters
    assert sum(t.repeat * t.elements for t in tensors) == run.parameters
    setting = Setting(
        micro_batch_size=BATCH,
        sequence_length=SEQUENCE,
        precision=precision(variant),
        method=method,
        recompute=Recompute(mode="full" if variant.recompute else "none"),
        attention={"flash_attention_2": "flash"}.get(variant.attention, variant.attention),
        loss="default",
        profile=profile_named("transformers"),
    )
    levels = pass_levels(record_step(shape, setting))
    states = run.moments["steady"] - BATCH * SEQUENCE * 8
    for moment in ("forward_end", "forward_peak", "backward_peak"):
        real = run.moments[moment] - states
        assert getattr(levels, moment) == pytest.approx(real, rel=TOLERANCE), moment


SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96, "vocab_size": 128,
    "pad_token_id": None,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
COUNTED: dict[str, dict[str, Any]] = {
    **{name: {"model_type": name, **GROUPED} for name in ("llama", "mistral", "qwen2", "qwen3", "granite", "cohere")},
    **{name: {"model_type": name, **GROUPED} for name in ("gemma", "olmo2", "phi", "phi3", "starcoder2", "stablelm")},
    "gemma2": {"model_type": "gemma2", **GROUPED, "head_dim": 16},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
    "opt": {"model_type": "opt", **SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "falcon": {"model_type": "falcon", **SMALL},
    "qwen2_moe": {"model_type": "qwen2_moe", **GROUPED, "num_experts": 4},
    "granitemoe": {"model_type": "granitemoe", **GROUPED, "num_local_experts": 4},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4},
    "deepseek_v3": {
        "model_type": "deepseek_v3", **GROUPED, "q_lora_rank": 32, "kv_lora_rank": 16, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip
COUNTING: dict[str, tuple[Method, Callable[[], Any]]] = {
    "lora, all-linear": (
        Method(name="lora", rank=4, targets=("all-linear",)),
        lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    "dora, all-linear": (
        Method(name="lora", rank=4, targets=("all-linear",), dora=True),
        lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True),
    ),
    "lora, default": (Method(name="lora", rank=4), lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM")),
    "ia3, default": (Method(name="ia3"), lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "prompt": (
        Method(name="prompt", virtual_tokens=5),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
    "prefix": (
        Method(name="prefix", virtual_tokens=5),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.filterwarnings("ignore")
def test_trainable_counts(family: str) -> None:
    """Whatever peft makes of a method on a family, the planner counts the same, or says that it does not cover it."""
    from planner.ledger.targets import check_method
    from planner.measure.transformers_edge import build_causal_lm

    shape = shape_from_config(COUNTED[family])
    agreed = 0
    for name, (method, config) in COUNTING.items():
        with torch.device("meta"):
            model = build_causal_lm(COUNTED[family])
            try:
                real = peft.get_peft_model(model, config()).get_nb_trainable_parameters()
            except ValueError:
                continue  # peft has no default for this family, or refuses the target
        try:
            if method.name in ("lora", "ia3") and not method.targets:
                method = replace(method, targets=default_targets(shape, method))
            check_method(shape, method, profile_named("transformers"), sharded=False)
            tensors = state_tensors(shape, method, Precision())
        except PlannerError:
            continue
        trainable = sum(t.repeat * t.elements for t in tensors if t.trainable)
        assert (trainable, sum(t.repeat * t.elements for t in tensors)) == real, name
        agreed += 1
    assert agreed, "every family is compared in one method at least"

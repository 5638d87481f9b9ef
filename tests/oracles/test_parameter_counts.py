"""Parameter names and shapes against the reference classes, and totals of the whole catalogue.

The classes are built on the meta device, with few layers, from the catalogue's own configs and from small ones
for families that the catalogue has no entry of. Names, shapes and ties have to agree, not only the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from planner.ledger.weights import active_parameters, named_weights, parameter_counts
from planner.model.catalogue import CatalogueEntry, catalogue_entries, find_entry
from planner.model.shape import Attention, LatentAttention, ModelShape
from planner.readers.hf_config import shape_from_config
from planner.readers.models import load_model

ENTRIES = catalogue_entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_catalogue_totals(entry: CatalogueEntry) -> None:
    shape = load_model(entry.name)
    counts = parameter_counts(shape)
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")
    if entry.parameters is not None:
        assert counts["total"] == entry.parameters, f"ratio {counts['total'] / entry.parameters:.6f}"
        assert active_parameters(shape) == entry.active_parameters
    sizes = [key for key in shape.assumed if not key.startswith(("architectures=", "classifier_activation="))]
    assert sizes == [], "an entry states every size"
    assert not any("not understood" in line for line in shape.uncovered)


# Figures that the makers of the models print, to the digits they print: (model, parameters in billions, digits).
PUBLISHED_BILLIONS = [
    ("Llama-2-7b-hf", 6.74, 2),  # arXiv:2307.09288 and the model card's safetensors index
    ("Llama-3.1-405B", 405.9, 1),
    ("Mixtral-8x7B-v0.1", 46.7, 1),  # arXiv:2401.04088, section 2.1
    ("Mixtral-8x22B-v0.1", 140.6, 1),
    ("DeepSeek-V3", 671, 0),  # arXiv:2412.19437, abstract
    ("DeepSeek-V2", 236, 0),  # arXiv:2405.04434, abstract
    ("DeepSeek-V2-Lite", 15.7, 1),  # the same, appendix B
    ("deepseek-moe-16b-base", 16.4, 1),  # arXiv:2401.06066, section 5
    ("palm-540b", 540.35, 2),  # arXiv:2204.02311, table 1
    ("falcon-180B", 179, 0),
    ("bloom", 176.25, 2),  # arXiv:2211.05100, table 3
    ("grok-1", 316, 0),  # 314 on its page; 0.5 % above it
    ("Qwen2.5-7B", 7.62, 2),  # arXiv:2412.15115, model card
    ("gemma-2-9b", 9.24, 2),  # arXiv:2408.00118, table 2: 8.32 + 0.92
    ("gpt-oss-120b", 116.83, 2),  # arXiv:2508.10925, table 1
    ("gpt-oss-20b", 20.91, 2),
]


@pytest.mark.parametrize(("name", "billions", "digits"), PUBLISHED_BILLIONS)
def test_published_figures(name: str, billions: float, digits: int) -> None:
    total = parameter_counts(load_model(name))["total"]
    assert round(total / 1e9, digits) == pytest.approx(billions, abs=10**-digits), f"ratio {total / 1e9 / billions:.4f}"


# One published model for each type; the test cuts it to a few layers.
REPRESENTATIVES = [
    "gpt2",
    "gpt-j-6b",
    "pythia-160m",
    "opt-125m",
    "opt-350m",
    "bloom-560m",
    "mpt-7b",
    "falcon-7b",
    "falcon-40b",
    "phi-2",
    "Phi-3-mini-4k-instruct",
    "Phi-4-mini-instruct",
    "Phi-3.5-MoE-instruct",
    "stablelm-3b-4e1t",
    "stablelm-2-1_6b",
    "starcoder2-7b",
    "Llama-2-7b-hf",
    "Llama-3.2-1B",
    "Mistral-7B-v0.1",
    "Mistral-Nemo-Base-2407",
    "Ministral-3-8B-Base-2512",
    "Mixtral-8x7B-v0.1",
    "Qwen2-0.5B",
    "Qwen2.5-7B",
    "Qwen3-0.6B",
    "Qwen1.5-MoE-A2.7B",
    "Qwen3-30B-A3B",
    "Qwen3-Next-80B-A3B-Instruct",
    "gemma-2b",
    "gemma-2-2b",
    "gemma-3-1b-it",
    "OLMo-1B-hf",
    "OLMo-2-1124-7B",
    "Olmo-3-7B",
    "OLMoE-1B-7B-0924",
    "SmolLM3-3B",
    "DeepSeek-V2-Lite",
    "DeepSeek-V2",
    "DeepSeek-V3",
    "DeepSeek-V3.2",
    "DeepSeek-V4-Flash",
    "Kimi-K2-Instruct",
    "GLM-4-9B-chat",
    "GLM-4.5-Air",
    "GLM-5",
    "GLM-5.2",
    "MiniMax-M2.5",
    "MiMo-V2-Flash",
    "gpt-oss-20b",
    "dbrx-base",
    "Jamba-v0.1",
    "mamba-130m-hf",
    "mamba2-130m",
    "Mamba-Codestral-7B-v0.1",
    "falcon-mamba-7b",
    "Nemotron-H-56B-Base-8K",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "Nemotron-4-340B-Base",
    "aya-23-8B",
    "ERNIE-4.5-21B-A3B-PT",
]

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
# Variations that published configs of the list above do not show.
VARIATIONS: dict[str, dict[str, Any]] = {
    "llama, every bias": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"model_type": "llama", **SMALL, "head_dim": 32, "tie_word_embeddings": True},
    "granite": {"model_type": "granite", **SMALL, "attention_bias": True},
    "granitemoe": {"model_type": "granitemoe", **SMALL, "num_local_experts": 4},
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        **SMALL,
        "num_local_experts": 4,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "granitemoehybrid, dense": {
        "model_type": "granitemoehybrid",
        **SMALL,
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "position_embedding_type": "rope",
    },
    "ministral": {"model_type": "ministral", **SMALL, "head_dim": 16},
    "qwen2, upper window": {
        "model_type": "qwen2",
        **SMALL,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen3, biases": {"model_type": "qwen3", **SMALL, "attention_bias": True},
    "qwen2_moe, dense layers": {"model_type": "qwen2_moe", **SMALL, "num_experts": 4, "mlp_only_layers": [1]},
    "qwen3_moe, every other": {"model_type": "qwen3_moe", **SMALL, "num_experts": 8, "decoder_sparse_step": 2},
    "glm4": {"model_type": "glm4", **SMALL, "head_dim": 16, "pad_token_id": None},
    "exaone4": {"model_type": "exaone4", **SMALL},
    "cohere, head norms": {"model_type": "cohere", **SMALL, "use_qk_norm": True},
    "cohere2": {"model_type": "cohere2", **SMALL},
    "ernie4_5, biases": {"model_type": "ernie4_5", **SMALL, "use_bias": True},
    "gemma3_text, untied": {"model_type": "gemma3_text", **SMALL, "head_dim": 16, "tie_word_embeddings": False},
    "gpt2, narrow": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 80},
    "gpt_bigcode": {"model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_bigcode, all heads": {
        "model_type": "gpt_bigcode",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "multi_query": False,
    },
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
    },
    "gpt_neox, no biases": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "attention_bias": False,
    },
    "falcon, sequential": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "parallel_attn": False,
        "multi_query": False,
        "alibi": True,
        "bias": True,
    },
    "opt, no biases": {
        "model_type": "opt",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
    "phi, head norms": {"model_type": "phi", **SMALL, "qk_layernorm": True},
    "stablelm, parallel": {"model_type": "stablelm", **SMALL, "use_qkv_bias": True, "use_parallel_residual": True},
    "deepseek_v3, biases": {
        "model_type": "deepseek_v3",
        **SMALL,
        "attention_bias": True,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
    "mamba, biases": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "use_bias": True},
    "jamba, no experts": {"model_type": "jamba", **SMALL, "num_experts": 1, "num_experts_per_tok": 1},
    "nemotron_h, biases": {
        "model_type": "nemotron_h",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hybrid_override_pattern": "M-*E",
        "mlp_bias": True,
        "attention_bias": True,
        "n_routed_experts": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
    },
}
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LIST_KEYS = ("layer_types", "mlp_layer_types", "indexer_types", "compress_ratios", "layers_block_type")


def cut(config: dict[str, Any], layers: int = 7) -> dict[str, Any]:
    """The config with at most so many layers, its lists by layer included."""
    small = copy.deepcopy(config)
    for key in DEPTH_KEYS:
        if key in small:
            small[key] = min(small[key], layers)
    for key in LIST_KEYS:
        if key in small:
            small[key] = small[key][: layers + 5 if key == "layers_block_type" else layers]
    if "hybrid_override_pattern" in small:
        small["hybrid_override_pattern"] = small["hybrid_override_pattern"][:12]
        small.pop("num_hidden_layers", None)
    return small


def reference_model(config: dict[str, Any]) -> Any:
    """The reference class on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    given = dict(config)
    if config["model_type"] == "kimi_k2":
        given["model_type"] = "deepseek_v3"  # the class that its own code derives from
    if config["model_type"] == "dbrx":
        given["attn_config"] = {"rope_theta": 500_000.0, **config["attn_config"]}
    given.pop("quantization_config", None)
    described = transformers.AutoConfig.for_model(**given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(described)
    model.tie_weights()
    return model


def reference_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters of the reference class; tied ones once, under their first name."""
    for name, parameter in reference_model(config).named_parameters():
        yield name, tuple(parameter.shape)


def compare(shape: ModelShape, config: dict[str, Any]) -> None:
    ours = {name: weight for name, weight in named_weights(shape)}
    theirs = dict(reference_shapes(config))
    assert sorted(ours) == sorted(theirs)
    for name, sizes in theirs.items():
        weight = ours[name]
        if shape.model_type == "gpt2" and weight.kind == "linear":
            sizes = sizes[::-1]  # Conv1D stores (in, out)
        if name.endswith("moe_statics.e_score_correction_bias"):
            sizes = sizes[1:]  # stored with a leading group of one
        assert weight.shape == sizes, name


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_published_configs_against_the_reference_class(name: str) -> None:
    entry = find_entry(name)
    assert entry is not None
    config = cut(dict(entry.config))
    compare(shape_from_config(config), config)


@pytest.mark.parametrize("label", VARIATIONS)
def test_variations_against_the_reference_class(label: str) -> None:
    config = VARIATIONS[label]
    compare(shape_from_config(config), config)


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if "V4" not in name])
def test_windows_positions_and_dropout_against_the_reference_class(name: str) -> None:
    """The window of every layer, how much of each head rotates, and the rates of dropout."""
    entry = find_entry(name)
    assert entry is not None
    config = cut(dict(entry.config))
    shape, model = shape_from_config(config), reference_model(config)
    torch = pytest.importorskip("torch")
    stack = next(
        module
        for _, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(shape.blocks)
    )
    for block, layer in zip(shape.blocks, stack, strict=True):
        if not isinstance(block.mixer, Attention):
            continue
        windows = {part.sliding_window for part in layer.modules() if hasattr(part, "sliding_window")}
        assert windows <= {block.mixer.window}
        rates = {part.p for part in layer.modules() if isinstance(part, torch.nn.Dropout)}
        assert rates <= {block.dropout, block.mixer.dropout}
    rotated = {block.mixer.rotary_dim for block in shape.blocks if isinstance(block.mixer, Attention)} - {0}
    rotated |= {block.mixer.rope_dim for block in shape.blocks if isinstance(block.mixer, LatentAttention)}
    tables = {2 * len(buffer) for key, buffer in model.named_buffers() if key.endswith("inv_freq")}
    if tables:  # GPT-J keeps whole sine tables instead
        assert rotated == tables

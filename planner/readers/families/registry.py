"""Which module of this package reads which `model_type`, so that reading one config imports one module."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

from planner.model.shape import ModelShape
from planner.readers.config_view import ConfigView

__all__ = ["MODULE_OF", "Reader", "known_types", "reader_of"]

Reader = Callable[[ConfigView], ModelShape]

_TYPES_OF: Final[dict[str, str]] = {
    "bloom": "bloom mpt",
    "chatglm": "chatglm",
    "cohere": "cohere cohere2 ernie4_5 nemotron",
    "deepseek": "deepseek deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa kimi_k2 mistral4",
    "deepseek_v4": "deepseek_v4",
    "falcon": "falcon",
    "gemma": "gemma gemma2 gemma3_text",
    "gpt": "gpt2 gpt_bigcode gpt_neo gpt_neox gptj",
    "hybrid": "granitemoehybrid jamba nemotron_h qwen3_next",
    "llama": "baichuan exaone4 glm glm4 granite internlm2 llama ministral ministral3 mistral qwen2 qwen3 smollm3",
    "mamba": "falcon_mamba mamba mamba2",
    "moe": "dbrx ernie4_5_moe glm4_moe gpt_oss granitemoe mimo_v2_flash minimax_m2 mixtral olmoe qwen2_moe qwen3_moe",
    "nemotron_nas": "nemotron-nas",
    "olmo": "olmo olmo2 olmo3",
    "opt": "opt",
    "phi": "phi phi3 phimoe",
    "stablelm": "stablelm starcoder2",
    "unpublished": "gopher grok-1 palm",
}
_FURTHER_TYPES_OF: Final[dict[str, str]] = {
    "bert": "bert",
    "clip": "clip",
    "distilbert": "distilbert",
    "dit": "dit",
    "flux": "FluxTransformer2DModel",
    "gemma3_multimodal": "gemma3",
    "gemma4": "gemma4 gemma4_text",
    "kimi_k25": "kimi_k25",
    "llama4": "llama4 llama4_text",
    "llava": "llava",
    "minimax_m3": "minimax_m3 minimax_m3_vl minimax_m3_vl_text",
    "mistral3": "mistral3",
    "mllama": "mllama mllama_text_model",
    "modernbert": "modernbert",
    "qwen3_5": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    "qwen_vl": "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe",
    "roberta": "roberta xlm-roberta",
    "t5": "t5",
    "unet": "UNet2DConditionModel",
    "vit": "vit",
    "whisper": "whisper",
}
MODULE_OF: Final[dict[str, str]] = {
    model_type: module
    for table in (_TYPES_OF, _FURTHER_TYPES_OF)
    for module, types in table.items()
    for model_type in types.split()
}


def known_types() -> tuple[str, ...]:
    """Every `model_type` that can be read, sorted."""
    return tuple(sorted(MODULE_OF))


def reader_of(model_type: str) -> Reader | None:
    """The function that reads configs of the given type, or None when the type is not known."""
    module = MODULE_OF.get(model_type)
    if module is None:
        return None
    readers: dict[str, Reader] = import_module(f"planner.readers.families.{module}").READERS
    return readers[model_type]

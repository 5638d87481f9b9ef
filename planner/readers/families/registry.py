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
    "falcon": "falcon",
    "gemma": "gemma gemma2 gemma3_text",
    "gpt": "gpt2 gpt_bigcode gpt_neo gpt_neox gptj",
    "llama": "baichuan exaone4 glm glm4 granite internlm2 llama ministral ministral3 mistral qwen2 qwen3 smollm3",
    "moe": "dbrx ernie4_5_moe glm4_moe gpt_oss granitemoe mimo_v2_flash minimax_m2 mixtral olmoe qwen2_moe qwen3_moe",
    "opt": "opt",
    "phi": "phi phi3 phimoe",
    "stablelm": "stablelm starcoder2",
}
MODULE_OF: Final[dict[str, str]] = {
    model_type: module for module, types in _TYPES_OF.items() for model_type in types.split()
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

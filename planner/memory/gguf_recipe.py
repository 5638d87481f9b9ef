"""Which block format `llama-quantize` gives to each tensor: a GGUF file type is a recipe, not one width.

Behaviour of src/llama-quant.cpp in the tree vendored by llama-cpp-python 0.3.36 (2026), run without an importance
matrix, which changes a few tensors of some types. Checked against the table of bits per weight that llama.cpp
prints for Llama-3.1-8B in tools/quantize/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["GgufModel", "GgufRole", "block_format_of"]

GgufRole = Literal[
    "embedding", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_kv_b", "attn_output",
    "ffn_gate", "ffn_up", "ffn_down", "other",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What the recipes ask about a model.

    attention_layers: how many layers own a value projection. large: what llama.cpp calls a 70B (80 layers of Llama
    or Qwen 2), whose eight-fold shared values get more bits.
    """

    layers: int
    attention_layers: int
    queries_per_kv_head: int
    experts: int
    tied: bool
    large: bool
    falcon: bool


_BASE: Mapping[str, str] = {
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
}
_LOWEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_WIDER_LOWEST = ("IQ2_S", "IQ2_M")
_EIGHT_EXPERTS_Q5_OUTPUT = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip


def _more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third one between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def block_format_of(file_type: str, role: GgufRole, layer: int, attention_layer: int, model: GgufModel) -> str:
    """The block format that a matrix of `role` in block `layer` gets in a file of `file_type`.

    layer: index of the block; attention_layer: how many blocks with a value projection come before it.
    Neither matters for `embedding` and `output`.
    """
    base = _BASE.get(file_type, file_type)
    if file_type in ("F32", "F16", "BF16"):
        return file_type
    if role == "output" or (role == "embedding" and model.tied):
        return _output(file_type, base, model)
    if file_type == "MXFP4_MOE":
        return "MXFP4" if role.startswith("ffn_") and model.experts else "Q8_0"
    if role == "embedding":
        return _embedding(file_type, base)
    if role in ("attn_v", "attn_qkv", "attn_kv_b"):
        return _values(file_type, base, attention_layer, model)
    if role in ("attn_k", "attn_q"):
        if role == "attn_k" and model.experts == 8:
            return "Q4_K" if file_type in _LOWEST else "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(file_type, base)
    if role == "ffn_down":
        return _down(file_type, base, layer, model)
    if role == "attn_output":
        return _attention_output(file_type, base, model)
    if role in ("ffn_gate", "ffn_up") and file_type == "IQ3_XS":
        return "IQ3_XXS" if model.layers // 8 <= layer < 7 * model.layers // 8 else base
    return base


def _output(file_type: str, base: str, model: GgufModel) -> str:
    if file_type == "MXFP4_MOE" or model.falcon or base == "Q8_0":
        return "Q8_0"
    return "Q5_K" if file_type in (*_LOWEST, "IQ3_XXS") else "Q6_K"


def _embedding(file_type: str, base: str) -> str:
    if file_type in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
        return "Q2_K"
    if file_type in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if file_type in ("TQ1_0", "TQ2_0") else base


def _values(file_type: str, base: str, index: int, model: GgufModel) -> str:
    shared = model.queries_per_kv_head >= 4
    if file_type in _LOWEST:
        if shared or model.experts >= 4:
            return "Q4_K"
        return "IQ3_S" if file_type in _WIDER_LOWEST else "Q2_K"
    chosen = base
    match file_type:
        case "Q2_K":
            chosen = "Q4_K" if shared else "Q3_K"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S":
            chosen = "Q4_K" if shared else base
        case "IQ3_XXS":
            chosen = "Q4_K" if shared else base
        case "IQ3_M":
            chosen = "Q4_K"
        case "Q3_K_M":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        case "Q3_K_L":
            chosen = "Q5_K"
        case "IQ4_NL" | "IQ4_XS":
            chosen = "Q5_K" if shared else base
        case "Q4_K_M" | "Q5_K_M":
            chosen = "Q6_K" if _more_bits(index, model.attention_layers) else base
        case "Q4_K_S":
            chosen = "Q5_K" if index < 4 else base
    if model.large and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if model.experts == 8 else chosen


def _down(file_type: str, base: str, layer: int, model: GgufModel) -> str:
    n, early = model.layers, layer < model.layers // 8
    more = _more_bits(layer, n)
    if file_type in _LOWEST:
        return ("IQ3_S" if file_type in _WIDER_LOWEST else "Q2_K") if early else base
    match file_type:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if early else base
        case "Q3_K_M":
            if layer < n // 16:
                return "Q5_K"
            return "Q4_K" if not model.falcon or more else "Q3_K"
        case "IQ3_M":
            return "Q4_K" if early or (model.experts == 8 and more) else base
        case "Q3_K_L":
            return "Q4_K" if model.falcon else "Q5_K"
        case "Q4_K_M" if model.falcon:
            return "Q6_K" if layer < n // 16 else "Q5_K" if more else "Q4_K"
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if more else base
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if early else base
        case "Q4_K_S":
            return "Q5_K" if early and not model.falcon else base
    return base


def _attention_output(file_type: str, base: str, model: GgufModel) -> str:
    if model.falcon:
        return "Q4_K" if file_type == "Q3_K_L" else base
    if model.experts == 8:
        return "Q5_K" if file_type in (*_LOWEST, *_EIGHT_EXPERTS_Q5_OUTPUT) else base
    if file_type in ("IQ1_S", "IQ1_M"):
        return "IQ2_XXS"
    return {
        "IQ2_S": "IQ3_S",
        "IQ2_M": "IQ3_S",
        "Q2_K": "Q3_K",
        "IQ3_XXS": "IQ3_S",
        "Q3_K_M": "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ3_M": "Q4_K",
    }.get(file_type, base)

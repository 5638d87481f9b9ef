"""Weight formats that carry scales: how many bytes a matrix takes in each of them.

A matrix has `out` rows of `inner` elements; scales belong to groups of elements of one row, unless said otherwise.
Bytes are those of the stored tensors, before an allocator rounds them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from planner.errors import UnknownName, nearest
from planner.formats import BITS

__all__ = [
    "BLOCK_FORMATS",
    "GGUF_FILE_TYPES",
    "QUANTIZATIONS",
    "BlockFormat",
    "MatrixFormat",
    "block_format_fitting",
    "canonical_quantization",
    "matrix_bytes",
    "row_bytes",
]

MatrixFormat = Literal[
    "fp32", "bf16", "fp16", "fp8", "fp8-block", "int8", "nf4", "nf4-double", "gptq-4bit", "awq-4bit", "mxfp4", "nvfp4"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A format of ggml: `elements` consecutive elements of a row share one struct of `bytes` bytes."""

    elements: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of one element, its share of the scales included."""
        return 8 * self.bytes / self.elements


# The C structs of ggml-common.h; their sizes are asserted there at compile time.
#                  elements  bytes     what the struct holds
BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    name: BlockFormat(elements=elements, bytes=size)
    for name, elements, size in (
        ("F32", 1, 4),
        ("F16", 1, 2),
        ("BF16", 1, 2),
        ("Q4_0", 32, 18),  #      fp16 scale + 32 x 4 bits
        ("Q4_1", 32, 20),  #      fp16 scale, fp16 minimum + 32 x 4 bits
        ("Q5_0", 32, 22),  #      fp16 scale + 32 x 4 bits + 32 x 1 bit
        ("Q5_1", 32, 24),  #      fp16 scale, fp16 minimum + 32 x 5 bits
        ("Q8_0", 32, 34),  #      fp16 scale + 32 x 8 bits
        ("Q2_K", 256, 84),  #     16 sub-blocks: 16 B of scales + 64 + 2 x fp16
        ("Q3_K", 256, 110),  #    32 + 64 + 12 B of scales + fp16
        ("Q4_K", 256, 144),  #    2 x fp16 + 12 B of scales + 128
        ("Q5_K", 256, 176),  #    2 x fp16 + 12 B of scales + 32 + 128
        ("Q6_K", 256, 210),  #    128 + 64 + 16 B of scales + fp16
        ("IQ1_S", 256, 50),
        ("IQ1_M", 256, 56),
        ("IQ2_XXS", 256, 66),
        ("IQ2_XS", 256, 74),
        ("IQ2_S", 256, 82),
        ("IQ3_XXS", 256, 98),
        ("IQ3_S", 256, 110),
        ("IQ4_NL", 32, 18),
        ("IQ4_XS", 256, 136),
        ("TQ1_0", 256, 54),
        ("TQ2_0", 256, 66),
        ("MXFP4", 32, 17),  #     E8M0 scale + 32 x 4 bits
    )
}

# What llama-quantize writes when the columns of a matrix are no multiple of the block (src/llama-quant.cpp,
# tensor_type_fallback, read in the tree vendored by llama-cpp-python 0.3.36); F16 when that does not fit either.
_SMALLER_BLOCK: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# fmt: off
GGUF_FILE_TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L",
    "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M",
    "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE",
)
# fmt: on
QUANTIZATIONS = ("none", "fp8", "int8", "nf4", "gptq-4bit", "awq-4bit", "mxfp4", *GGUF_FILE_TYPES)
_BY_FOLD = {name.casefold(): name for name in QUANTIZATIONS}

GROUP = 128  # gptq-4bit, awq-4bit: elements of a row that share a scale, as published checkpoints have it
FP8_BLOCK = 128  # DeepSeek-V3 (arXiv:2412.19437) section 3.3.2: weights are scaled in tiles of 128 x 128
BITSANDBYTES_BLOCK = 64  # bitsandbytes functional.py quantize_4bit, default blocksize
BITSANDBYTES_NESTED_BLOCK = 256  # the same, double quantisation of the scales


def canonical_quantization(name: str) -> str:
    """The quantization's own spelling (`q4_k_m` is `Q4_K_M`). Raises UnknownName with the nearest one."""
    try:
        return _BY_FOLD[name.casefold()]
    except KeyError:
        raise UnknownName(f'"{name[:60]}" is not a weight quantization; {nearest(name, QUANTIZATIONS)}') from None


def block_format_fitting(name: str, inner: int) -> str:
    """The block format that rows of `inner` elements get when `name` is wanted.

    >>> block_format_fitting("Q4_K", 4096), block_format_fitting("Q4_K", 2880), block_format_fitting("Q4_K", 100)
    ('Q4_K', 'Q5_0', 'F16')
    """
    for candidate in (name, _SMALLER_BLOCK.get(name, name)):
        if inner % BLOCK_FORMATS[candidate].elements == 0:
            return candidate
    return "F16"


def row_bytes(name: str, inner: int) -> int:
    """Bytes of one row of `inner` elements in a block format; the last block is whole even when the row ends in it."""
    block = BLOCK_FORMATS[name]
    return -(-inner // block.elements) * block.bytes


def matrix_bytes(form: MatrixFormat, out: int, inner: int) -> int:
    """Bytes of one (out, inner) matrix, scales included.

        fp8           n + 4 out                        one fp32 scale for each row (compressed-tensors "FP8-dynamic")
        fp8-block     n + 4 ceil(out/128) ceil(in/128)
        int8          n + 4 out                        bitsandbytes LLM.int8(), and w8a8 with a scale for each row
        nf4           n/2 + 4 n/64 + 64                the 16 fp32 code values
        nf4-double    n/2 + n/64 + 4 n/(64 256) + 64 + 1024 + 4    nested scales, their code table, their offset
        gptq-4bit     n/2 + 2.5 out ceil(in/128) + 4 in            fp16 scale, 4-bit zero, g_idx
        awq-4bit      n/2 + 2.5 out ceil(in/128)
        mxfp4         out (in/2 + ceil(in/32))         OCP microscaling: one E8M0 scale for 32 elements
        nvfp4         out (in/2 + ceil(in/16)) + 4     E4M3 scales and one fp32 scale

    n = out x in. bitsandbytes formulas were measured: 8,655,940 B for 4096 x 4096 with double quantisation.

    >>> matrix_bytes("nf4-double", 4096, 4096), matrix_bytes("nf4", 4096, 4096), matrix_bytes("int8", 4096, 4096)
    (8655940, 9437248, 16793600)
    """
    n = out * inner
    match form:
        case "fp32" | "bf16" | "fp16":
            return n * BITS[form] // 8
        case "fp8" | "int8":
            return n + 4 * out
        case "fp8-block":
            return n + 4 * -(-out // FP8_BLOCK) * -(-inner // FP8_BLOCK)
        case "nf4":
            return -(-n // 2) + 4 * -(-n // BITSANDBYTES_BLOCK) + 64
        case "nf4-double":
            blocks = -(-n // BITSANDBYTES_BLOCK)
            return -(-n // 2) + blocks + 4 * -(-blocks // BITSANDBYTES_NESTED_BLOCK) + 64 + 1024 + 4
        case "gptq-4bit":
            return matrix_bytes("awq-4bit", out, inner) + 4 * inner
        case "awq-4bit":
            groups = -(-inner // GROUP)
            return -(-n // 2) + out * groups * 2 + -(-out * groups // 2)
        case "mxfp4":
            return out * (-(-inner // 2) + -(-inner // 32))
        case "nvfp4":
            return out * (-(-inner // 2) + -(-inner // 16)) + 4

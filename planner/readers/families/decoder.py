"""What the decoder families have in common: the trunk's sizes, grouped attention, window patterns, assembly."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from planner.errors import ModelConfigError
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Norm
from planner.readers.config_view import REQUIRED, ConfigView, Required

__all__ = [
    "FULL",
    "LAYER_NORM",
    "MOST_LAYERS",
    "RMS_NORM",
    "SLIDING",
    "Trunk",
    "assemble",
    "blocks_by_kind",
    "check_heads",
    "clamped",
    "gated_mlp",
    "grouped_attention",
    "head_size",
    "other_classes",
    "published_dtype",
    "quantization_method",
    "read_trunk",
    "rotary_dim",
    "window_kinds",
    "windowed",
]

RMS_NORM: Final = Norm(kind="rmsnorm")
LAYER_NORM: Final = Norm(kind="layernorm", bias=True, fp32=False)
MOST_LAYERS: Final = 10_000

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"

Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """The sizes that every decoder states."""

    hidden: int
    layers: int
    vocab: int
    max_positions: int | None
    tied: bool


def read_trunk(
    view: ConfigView,
    *,
    vocab: int,
    positions: int | None,
    tied: bool,
    hidden: int | Required = REQUIRED,
    layers: int | Required = REQUIRED,
    hidden_key: str = "hidden_size",
    layers_key: str = "num_hidden_layers",
    positions_key: str = "max_position_embeddings",
) -> Trunk:
    """The trunk of a config; `vocab`, `positions` and `tied` are the defaults of the reference class.

    Width and depth are required, but for the classes whose defaults are the published model itself: configs of
    those are found without them.
    """
    return Trunk(
        hidden=view.int(hidden_key, hidden, also=("hidden_size",)),
        layers=view.int(layers_key, layers, maximum=MOST_LAYERS, also=("num_hidden_layers",)),
        vocab=view.int("vocab_size", vocab),
        max_positions=view.maybe_int(positions_key, positions, also=("max_position_embeddings",)),
        tied=view.bool("tie_word_embeddings", tied),
    )


def check_heads(view: ConfigView, heads: int, kv_heads: int) -> None:
    """Raise unless each key/value head serves the same number of query heads."""
    if heads % kv_heads:
        raise ModelConfigError(
            f"{view.owner} config: {heads} query heads cannot share {kv_heads} key/value heads evenly."
        )


def head_size(view: ConfigView, hidden: int, heads: int, default: int | None = None) -> int:
    """`head_dim`, or H/A when the config leaves it out and the reference class does so too."""
    stated = view.maybe_int("head_dim", default)
    if stated is not None:
        return stated
    if hidden % heads:
        raise ModelConfigError(f"{view.owner} config: hidden size {hidden} is not a multiple of {heads} heads.")
    return hidden // heads


def rotary_dim(view: ConfigView, head_dim: int, default: float = 1.0) -> int:
    """How many elements of each head are rotated: head size x `partial_rotary_factor`, which two places may hold."""
    rope = view.sub("rope_parameters")
    rope.ignore(*rope.keys())
    nested = rope.float("partial_rotary_factor", default, maximum=1.0)
    return int(head_dim * view.float("partial_rotary_factor", nested, maximum=1.0))


def grouped_attention(
    view: ConfigView,
    hidden: int,
    *,
    heads: int | Required = REQUIRED,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    rotary: float = 1.0,
    **rest: Any,
) -> Attention:
    """Grouped-query attention with rotary positions; the keyword values are the defaults of the reference class.

    kv_heads None: as many as query heads. head_dim None: H/A.
    """
    count = view.int("num_attention_heads", heads)
    groups = view.maybe_int("num_key_value_heads", kv_heads) or count
    check_heads(view, count, groups)
    size = head_size(view, hidden, count, head_dim)
    return Attention(
        heads=count,
        kv_heads=groups,
        head_dim=size,
        q_bias=qkv_bias,
        k_bias=qkv_bias,
        v_bias=qkv_bias,
        out_bias=out_bias,
        rotary_dim=rotary_dim(view, size, rotary),
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
        **rest,
    )


def gated_mlp(view: ConfigView, width: int | Required = REQUIRED, *, bias: bool = False, act: str = "silu") -> Mlp:
    """The gate, up, down layer of Llama; `width` and `act` are the defaults of the reference class."""
    return Mlp(
        width=view.int("intermediate_size", width),
        gated=True,
        activation=view.str("hidden_act", act),
        up_bias=bias,
        down_bias=bias,
    )


def window_kinds(view: ConfigView, layers: int, default: Callable[[int], bool]) -> list[str]:
    """`layer_types`, or for each layer whether `default` says that it slides."""
    stated = view.strings("layer_types", length=layers, among=(FULL, SLIDING))
    if stated is not None:
        return stated
    return [SLIDING if default(layer) else FULL for layer in range(layers)]


def blocks_by_kind(kinds: Sequence[Kind], make: Callable[[Kind], Block]) -> tuple[Block, ...]:
    """One block for each entry of `kinds`; equal kinds share one object, which makes counting quick."""
    made = {kind: make(kind) for kind in dict.fromkeys(kinds)}
    return tuple(made[kind] for kind in kinds)


def windowed(attention: Attention, kind: str, window: int | None) -> Attention:
    """The attention of one layer of the given type."""
    return replace(attention, window=window) if kind == SLIDING else attention


def published_dtype(view: ConfigView) -> str | None:
    """The format of the published checkpoint, without the "torch." of old files."""
    value = (view.has("dtype") and view.str("dtype")) or (view.has("torch_dtype") and view.str("torch_dtype")) or ""
    return value.removeprefix("torch.") or None


def quantization_method(view: ConfigView) -> str | None:
    """How the checkpoint is quantised, where its config says so."""
    if not view.has("quantization_config"):
        return None
    details = view.sub("quantization_config")
    details.ignore(*details.keys())
    return details.str("quant_method", "unnamed")


def clamped(view: ConfigView, key: str = "clip_qkv") -> tuple[str, ...]:
    """A sentence when queries, keys and values are clamped, which keeps them once more for backward."""
    if not view.has(key):
        return ()
    return (f"clamping of queries, keys and values at {view.float(key):g}",)


def other_classes(view: ConfigView) -> tuple[str, ...]:
    """A sentence when the checkpoint was saved from another class than the language model that is described."""
    classes = view.strings("architectures") or []
    if not classes or any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in classes
    ):
        return ()
    if view.has("auto_map"):  # code of its own: its class names say nothing
        return ()
    return (f"the checkpoint holds {classes[0]}; the language model with its output head is described",)


def assemble(
    view: ConfigView,
    trunk: Trunk,
    blocks: tuple[Block, ...],
    *,
    norm: Norm | None,
    embedding: Embedding | None = None,
    head: Head | None = None,
    prefix: str = "model.layers",
    uncovered: tuple[str, ...] = (),
) -> ModelShape:
    """The whole decoder: `model.embed_tokens`, blocks, `model.norm` and `lm_head` unless told otherwise."""
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=trunk.hidden,
        blocks=blocks,
        embedding=embedding or Embedding(rows=trunk.vocab, size=trunk.hidden),
        head=head or Head(rows=trunk.vocab, tied=trunk.tied, norm=norm),
        max_positions=trunk.max_positions,
        dtype=published_dtype(view),
        quantization=quantization_method(view),
        prefix=prefix,
        uncovered=uncovered + other_classes(view),
    )

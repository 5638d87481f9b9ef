"""DiT: a transformer over the patches of a latent image, modulated by timestep and class.

Peebles and Xie 2022 (arXiv:2212.09748). The config holds the arguments of the original class, with `model_type: dit`;
the class of `diffusers` repeats the embedders of timestep and class in every block and is larger by a tenth.
"""

from __future__ import annotations

from typing import Final

from planner.errors import ModelConfigError
from planner.ledger.weights.convolution import convolution_weights
from planner.ledger.weights.linear import linear_weights
from planner.model.shape import Block, Head, ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import MOST_LAYERS, published_dtype
from planner.readers.families.encoder import bidirectional_attention, parameter, plain_mlp

__all__ = ["READERS"]

_NORM: Final = Norm(kind="layernorm", affine=False, fp32=False)
_FREQUENCIES: Final = 256  # sinusoids of the timestep embedder
_BLOCK_MODULATIONS: Final = 6  # shift, scale and gate for each of two branches
_FINAL_MODULATIONS: Final = 2  # shift and scale


def _dit(view: ConfigView) -> ModelShape:
    """Adaptive layer norms without weights of their own; the position table is fixed but stored."""
    hidden, heads = view.int("hidden_size", 1152), view.int("num_heads", 16)
    side, grid, channels = view.int("patch_size", 2), view.int("input_size", 32), view.int("in_channels", 4)
    if grid % side:
        raise ModelConfigError(f"dit config: input_size {grid} is not a multiple of patch_size {side}.")
    tokens = (grid // side) ** 2
    out = channels * (2 if view.bool("learn_sigma", True) else 1)
    classes = view.int("num_classes", 1000) + (view.float("class_dropout_prob", 0.1, maximum=1.0) > 0)
    width = int(hidden * view.float("mlp_ratio", 4.0))
    modulation = linear_weights("adaLN_modulation.1", _BLOCK_MODULATIONS * hidden, hidden, bias=True, component="other")
    block = Block(
        mixer=bidirectional_attention(view, hidden, heads, names=("attn.qkv",), out_name="attn.proj"),
        ffn=plain_mlp(width, "gelu_pytorch_tanh", ("mlp.fc1", "mlp.fc2")),
        norm=_NORM,
        norm_names=("norm1", "norm2"),
        extra=modulation,
    )
    final = "final_layer"
    extra = (
        parameter("pos_embed", 1, tokens, hidden, component="embed_in"),
        *convolution_weights("x_embedder.proj", hidden, channels, (side, side), bias=True, component="embed_in"),
        *linear_weights("t_embedder.mlp.0", hidden, _FREQUENCIES, bias=True, component="other"),
        *linear_weights("t_embedder.mlp.2", hidden, hidden, bias=True, component="other"),
        parameter("y_embedder.embedding_table.weight", classes, hidden, kind="embedding", component="embed_in"),
        *linear_weights(f"{final}.linear", side * side * out, hidden, bias=True, component="other"),
        *linear_weights(
            f"{final}.adaLN_modulation.1", _FINAL_MODULATIONS * hidden, hidden, bias=True, component="other"
        ),
    )
    return ModelShape(
        name="",
        model_type=view.owner,
        hidden=hidden,
        blocks=(block,) * view.int("depth", 28, maximum=MOST_LAYERS),
        embedding=None,
        head=Head(rows=0, tied=False, norm=_NORM, norm_name=f"{final}.norm_final"),
        extra=extra,
        max_positions=tokens,
        tokens=tokens,
        dtype=published_dtype(view),
        prefix="blocks",
        uncovered=("adaptive modulation of the norms", "embedders of patches, timestep and class"),
    )


READERS = {"dit": _dit}

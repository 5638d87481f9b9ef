"""OPT: learned positions with two spare rows, layer norms before (or in one size after) each branch."""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ModelConfigError
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, assemble, read_trunk

__all__ = ["READERS"]

_SPARE_POSITIONS = 2  # positions are looked up two rows further on, a left-over of padding ids


def _opt(view: ConfigView) -> ModelShape:
    trunk = read_trunk(view, vocab=50_272, positions=2048, tied=True)
    heads = view.int("num_attention_heads", 12)
    if trunk.hidden % heads:
        raise ModelConfigError(f"opt config: hidden size {trunk.hidden} is not a multiple of {heads} heads.")
    bias = view.bool("enable_bias", True)
    norm = replace(LAYER_NORM, affine=view.bool("layer_norm_elementwise_affine", True))
    before = view.bool("do_layer_norm_before", True)
    width = view.maybe_int("word_embed_proj_dim", None) or trunk.hidden
    projected = width != trunk.hidden
    dropout = view.float("dropout", 0.1, maximum=1.0)
    view.float("layerdrop", 0.0, maximum=1.0)
    view.ignore("activation_dropout")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=trunk.hidden // heads,
        out_name="self_attn.out_proj",
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=bias,
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.int("ffn_dim", 3072),
        gated=False,
        activation=view.str("activation_function", "relu"),
        names=("fc1", "fc2"),
        up_bias=bias,
        down_bias=bias,
    )
    block = Block(
        mixer=attention,
        ffn=mlp,
        residual="sequential" if before else "post",
        norm=norm,
        norm_names=("self_attn_layer_norm", "final_layer_norm"),
        dropout=dropout,
    )
    final = before and not view.bool("_remove_final_layer_norm", False)
    positions = trunk.max_positions or 2048
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=norm,
        embedding=Embedding(
            rows=trunk.vocab,
            size=width,
            name="model.decoder.embed_tokens",
            positions=positions + _SPARE_POSITIONS,
            position_size=trunk.hidden,
            position_name="model.decoder.embed_positions",
            projection=trunk.hidden if projected else None,
            projection_name="model.decoder.project_in",
        ),
        head=Head(
            rows=trunk.vocab,
            tied=trunk.tied,
            norm=norm if final else None,
            norm_name="model.decoder.final_layer_norm",
            projection=width if projected else None,
            projection_name="model.decoder.project_out",
        ),
        prefix="model.decoder.layers",
    )


READERS = {"opt": _opt}

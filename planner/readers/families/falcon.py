"""Falcon: attention and feed-forward beside each other, few or one key/value heads, one fused matrix."""

from __future__ import annotations

from planner.errors import ModelConfigError
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, assemble, check_heads, read_trunk

__all__ = ["READERS"]


def _falcon(view: ConfigView) -> ModelShape:
    """7B has one key/value head and one norm; 40B and 180B ("new decoder architecture") have groups and two norms."""
    hidden_key = "n_embed" if view.has("n_embed") else "hidden_size"
    trunk = read_trunk(view, vocab=65_024, positions=2048, tied=True, hidden_key=hidden_key)
    heads = view.int("num_attention_heads", 71)
    if trunk.hidden % heads:
        raise ModelConfigError(f"falcon config: hidden size {trunk.hidden} is not a multiple of {heads} heads.")
    grouped = view.bool("new_decoder_architecture", False)
    single = view.bool("multi_query", True)
    parallel = view.bool("parallel_attn", True)
    bias = view.bool("bias", False)
    alibi = view.bool("alibi", False)
    stated = view.maybe_int("num_kv_heads", None)
    kv_heads = (stated or heads) if grouped else (1 if single else heads)
    check_heads(view, heads, kv_heads)
    norms = view.maybe_int("num_ln_in_parallel_attn", None) or (2 if grouped else 1)
    names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    if parallel:
        names = ("ln_attn", "ln_mlp") if norms == 2 else ("input_layernorm",)
    head_dim = trunk.hidden // heads
    view.ignore("apply_residual_connection_post_layernorm", "rotary")
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        names=("self_attention.query_key_value",),
        out_name="self_attention.dense",
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=bias,
        rotary_dim=0 if alibi else head_dim,
        position_bias="alibi" if alibi else "none",
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.maybe_int("ffn_hidden_size", None) or 4 * trunk.hidden,
        gated=False,
        activation=view.str("activation", "gelu"),
        names=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        up_bias=bias,
        down_bias=bias,
    )
    block = Block(
        mixer=attention,
        ffn=mlp,
        residual="parallel" if parallel else "sequential",
        norm=LAYER_NORM,
        norm_names=names,
        dropout=view.float("hidden_dropout", 0.0, maximum=1.0),
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="transformer.word_embeddings"),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=LAYER_NORM, norm_name="transformer.ln_f"),
        prefix="transformer.h",
    )


READERS = {"falcon": _falcon}

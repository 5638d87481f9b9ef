"""BLOOM and MPT: linear position biases (ALiBi) in place of position embeddings."""

from __future__ import annotations

from planner.errors import ModelConfigError
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, assemble, clamped, read_trunk

__all__ = ["READERS"]


def _bloom(view: ConfigView) -> ModelShape:
    """A norm right after the embedding; its own tanh approximation of gelu; biases everywhere."""
    hidden_key = "n_embed" if view.has("n_embed") else "hidden_size"
    trunk = read_trunk(
        view,
        vocab=250_880,
        positions=None,
        tied=True,
        hidden_key=hidden_key,
        layers_key="n_layer",
        positions_key="seq_length",
    )
    heads = view.int("n_head", 8, also=("num_attention_heads",))
    if trunk.hidden % heads:
        raise ModelConfigError(f"bloom config: hidden size {trunk.hidden} is not a multiple of {heads} heads.")
    view.ignore("slow_but_exact", "masked_softmax_fusion")
    view.ignore(
        "attention_softmax_in_fp32", "bias_dropout_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv"
    )
    view.ignore("unk_token_id", "n_inner", "num_attention_heads")
    after = view.bool("apply_residual_connection_post_layernorm", False)
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=trunk.hidden // heads,
        names=("self_attention.query_key_value",),
        out_name="self_attention.dense",
        q_bias=True,
        k_bias=True,
        v_bias=True,
        out_bias=True,
        position_bias="alibi",
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=4 * trunk.hidden,
        gated=False,
        activation="bloom_gelu",
        names=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        up_bias=True,
        down_bias=True,
    )
    block = Block(mixer=attention, ffn=mlp, norm=LAYER_NORM, dropout=view.float("hidden_dropout", 0.0, maximum=1.0))
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        embedding=Embedding(
            rows=trunk.vocab,
            size=trunk.hidden,
            name="transformer.word_embeddings",
            norm=LAYER_NORM,
            norm_name="transformer.word_embeddings_layernorm",
        ),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=LAYER_NORM, norm_name="transformer.ln_f"),
        prefix="transformer.h",
        uncovered=("residuals taken after the norms",) if after else (),
    )


def _mpt(view: ConfigView) -> ModelShape:
    """No biases anywhere, in the norms neither; the reference class knows no other feed-forward than 4H wide."""
    trunk = read_trunk(
        view,
        vocab=50_368,
        positions=2048,
        tied=True,
        hidden_key="d_model",
        layers_key="n_layers",
        positions_key="max_seq_len",
    )
    heads = view.int("n_heads", 16, also=("num_attention_heads",))
    if trunk.hidden % heads:
        raise ModelConfigError(f"mpt config: d_model {trunk.hidden} is not a multiple of {heads} heads.")
    inner = view.sub("attn_config")
    inner.ignore(*inner.keys())
    if inner.str("attn_type", "multihead_attention") != "multihead_attention":
        raise inner.fail("attn_type", "multihead_attention, the only kind the reference class builds")
    if view.int("expansion_ratio", 4) != 4:
        raise view.fail("expansion_ratio", "4, the only ratio the reference class builds")
    if not view.bool("no_bias", True):
        raise view.fail("no_bias", "true, the only form the reference class builds")
    view.ignore("learned_pos_emb", "embedding_fraction", "norm_type", "logit_scale", "init_device", "verbose")
    view.ignore("init_config", "is_encoder_decoder", "emb_pdrop", "use_pad_tok_in_ffn", "tokenizer_name")
    norm = Norm(kind="layernorm", fp32=False)
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=trunk.hidden // heads,
        names=("attn.Wqkv",),
        out_name="attn.out_proj",
        position_bias="alibi",
        dropout=inner.float("attn_pdrop", 0.0, maximum=1.0),
    )
    mlp = Mlp(width=4 * trunk.hidden, gated=False, activation="gelu", names=("ffn.up_proj", "ffn.down_proj"))
    dropout = inner.float("attn_pdrop", 0.0, maximum=1.0)  # the class reuses this rate on both branches
    block = Block(mixer=attention, ffn=mlp, norm=norm, norm_names=("norm_1", "norm_2"), dropout=dropout)
    view.ignore("resid_pdrop")
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=norm,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="transformer.wte"),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=norm, norm_name="transformer.norm_f"),
        prefix="transformer.blocks",
        uncovered=clamped(inner),
    )


READERS = {"bloom": _bloom, "mpt": _mpt}

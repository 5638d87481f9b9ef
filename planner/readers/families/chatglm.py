"""ChatGLM2, ChatGLM3 and GLM-4 under their first class (code in the repositories, not in the library)."""

from __future__ import annotations

from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import RMS_NORM, assemble, check_heads, read_trunk

__all__ = ["READERS"]


def _chatglm(view: ConfigView) -> ModelShape:
    """q, k and v in one matrix with biases, gate and up in another, half of each head rotated."""
    trunk = read_trunk(
        view, vocab=65_024, positions=2048, tied=False, layers_key="num_layers", positions_key="seq_length"
    )
    vocab = view.int("padded_vocab_size", trunk.vocab)
    heads, head_dim = view.int("num_attention_heads", 32), view.int("kv_channels", 128)
    kv_heads = view.int("multi_query_group_num", 1) if view.bool("multi_query_attention", False) else heads
    check_heads(view, heads, kv_heads)
    bias = view.bool("add_bias_linear", False)
    qkv_bias = view.bool("add_qkv_bias", False) or bias
    if not (view.bool("rmsnorm", True) and view.bool("post_layer_norm", True)):
        raise view.fail("rmsnorm", "true, as post_layer_norm does: the only form the checkpoints have")
    view.ignore("apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "bias_dropout_fusion")
    view.ignore(
        "attention_softmax_in_fp32", "fp32_residual_connection", "original_rope", "rope_ratio", "multi_query_group_num"
    )
    view.ignore("classifier_dropout", "quantization_bit", "pre_seq_len", "prefix_projection", "interleaved_qkv")
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        names=("self_attention.query_key_value",),
        out_name="self_attention.dense",
        q_bias=qkv_bias,
        k_bias=qkv_bias,
        v_bias=qkv_bias,
        out_bias=bias,
        rotary_dim=head_dim // 2,
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.int("ffn_hidden_size", 13_696),
        gated=True,
        activation="silu",
        names=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        up_bias=bias,
        down_bias=bias,
    )
    block = Block(mixer=attention, ffn=mlp, norm=RMS_NORM, dropout=view.float("hidden_dropout", 0.0, maximum=1.0))
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=RMS_NORM,
        embedding=Embedding(rows=vocab, size=trunk.hidden, name="transformer.embedding.word_embeddings"),
        head=Head(
            rows=vocab,
            tied=trunk.tied,
            norm=RMS_NORM,
            norm_name="transformer.encoder.final_layernorm",
            name="transformer.output_layer",
        ),
        prefix="transformer.encoder.layers",
    )


READERS = {"chatglm": _chatglm}

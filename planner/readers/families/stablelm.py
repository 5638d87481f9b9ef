"""StableLM and StarCoder 2: Llama's and GPT's feed-forward, rotary attention, layer norms."""

from __future__ import annotations

from planner.model.shape import Block, Embedding, Head, Mlp, ModelShape, Norm
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import LAYER_NORM, assemble, gated_mlp, grouped_attention, read_trunk

__all__ = ["READERS"]


def _stablelm(view: ConfigView) -> ModelShape:
    """Gated feed-forward, a quarter of each head rotated; 12B norms each head with weights of its own."""
    trunk = read_trunk(view, vocab=50_304, positions=4096, tied=False)
    normed = view.bool("qk_layernorm", False)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=32,
        kv_heads=32,
        qkv_bias=view.bool("use_qkv_bias", False),
        rotary=view.float("rope_pct", 0.25, maximum=1.0),
        qk_norm=Norm(kind="layernorm", fp32=False) if normed else None,
        qk_norm_over="heads",
        qk_norm_names=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    )
    parallel = view.bool("use_parallel_residual", False)
    block = Block(
        mixer=attention,
        ffn=gated_mlp(view, 6912),
        residual="parallel" if parallel else "sequential",
        norm=LAYER_NORM,
        norm_names=("input_layernorm",) if parallel else ("input_layernorm", "post_attention_layernorm"),
        dropout=view.float("hidden_dropout", 0.0, maximum=1.0),
    )
    return assemble(view, trunk, (block,) * trunk.layers, norm=LAYER_NORM)


def _starcoder2(view: ConfigView) -> ModelShape:
    """Plain feed-forward, biases everywhere."""
    trunk = read_trunk(view, vocab=49_152, positions=4096, tied=True)
    bias = view.bool("use_bias", True)
    attention = grouped_attention(
        view,
        trunk.hidden,
        heads=24,
        kv_heads=2,
        qkv_bias=bias,
        out_bias=bias,
        window=view.maybe_int("sliding_window", None),
    )
    view.ignore("activation_function", "mlp_type", "norm_type", "attention_softmax_in_fp32")
    view.ignore("scale_attention_softmax_in_fp32", "scale_attn_weights")
    mlp = Mlp(
        width=view.int("intermediate_size", 12_288),
        gated=False,
        activation=view.str("hidden_act", "gelu_pytorch_tanh"),
        names=("mlp.c_fc", "mlp.c_proj"),
        up_bias=bias,
        down_bias=bias,
    )
    block = Block(mixer=attention, ffn=mlp, norm=LAYER_NORM, dropout=view.float("residual_dropout", 0.0, maximum=1.0))
    embedding = Embedding(
        rows=trunk.vocab, size=trunk.hidden, dropout=view.float("embedding_dropout", 0.0, maximum=1.0)
    )
    head = Head(rows=trunk.vocab, tied=trunk.tied, norm=LAYER_NORM)
    return assemble(view, trunk, (block,) * trunk.layers, norm=LAYER_NORM, embedding=embedding, head=head)


READERS = {"stablelm": _stablelm, "starcoder2": _starcoder2}

"""GPT-2 and its descendants: GPT-BigCode, GPT-J, GPT-Neo, GPT-NeoX. Layer norms with biases, plain feed-forward."""

from __future__ import annotations

from typing import Any

from planner.errors import ModelConfigError
from planner.model.shape import Attention, Block, Embedding, Head, Mlp, ModelShape
from planner.readers.config_view import ConfigView
from planner.readers.families.decoder import (
    FULL,
    LAYER_NORM,
    SLIDING,
    Trunk,
    assemble,
    blocks_by_kind,
    read_trunk,
    rotary_dim,
    windowed,
)

__all__ = ["READERS"]


def _trunk(view: ConfigView, *, vocab: int = 50_257, positions: int = 1024, tied: bool = True) -> Trunk:
    """The trunk under GPT-2's own key names."""
    return read_trunk(
        view,
        vocab=vocab,
        positions=positions,
        tied=tied,
        hidden_key="n_embd",
        layers_key="n_layer",
        positions_key="n_positions",
    )


def _heads(view: ConfigView, hidden: int, key: str = "n_head") -> tuple[int, int]:
    """(A, D) with D = H/A."""
    heads = view.int(key, also=("num_attention_heads",))
    if hidden % heads:
        raise ModelConfigError(f"{view.owner} config: hidden size {hidden} is not a multiple of {heads} heads.")
    return heads, hidden // heads


def _learned_positions(view: ConfigView, trunk: Trunk, dropout: float) -> Embedding:
    """Token and position tables under GPT-2's names."""
    return Embedding(
        rows=trunk.vocab,
        size=trunk.hidden,
        name="transformer.wte",
        positions=trunk.max_positions or 0,
        position_name="transformer.wpe",
        dropout=dropout,
    )


def _gpt2(view: ConfigView) -> ModelShape:
    """GPT-2 with one key/value head for each query head, or one for all of them (GPT-BigCode's `multi_query`)."""
    trunk = _trunk(view)
    heads, head_dim = _heads(view, trunk.hidden)
    if view.bool("add_cross_attention", False):
        raise ModelConfigError(f'{view.owner} config: "add_cross_attention" is true; only decoders alone are read.')
    big_code = view.owner == "gpt_bigcode"
    view.ignore("n_ctx", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    view.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    view.ignore("summary_first_dropout", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    view.ignore("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache")
    view.ignore("validate_runner_input", "num_key_value_heads")
    attention = Attention(
        heads=heads,
        kv_heads=1 if big_code and view.bool("multi_query", True) else heads,
        head_dim=head_dim,
        names=("attn.c_attn",),
        out_name="attn.c_proj",
        q_bias=True,
        k_bias=True,
        v_bias=True,
        out_bias=True,
        dropout=view.float("attn_pdrop", 0.1, maximum=1.0),
    )
    mlp = Mlp(
        width=view.maybe_int("n_inner", None) or 4 * trunk.hidden,
        gated=False,
        activation=view.str("activation_function", "gelu_pytorch_tanh" if big_code else "gelu_new"),
        names=("mlp.c_fc", "mlp.c_proj"),
        up_bias=True,
        down_bias=True,
    )
    block = Block(
        mixer=attention,
        ffn=mlp,
        norm=LAYER_NORM,
        norm_names=("ln_1", "ln_2"),
        dropout=view.float("resid_pdrop", 0.1, maximum=1.0),
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        embedding=_learned_positions(view, trunk, view.float("embd_pdrop", 0.1, maximum=1.0)),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=LAYER_NORM, norm_name="transformer.ln_f"),
        prefix="transformer.h",
    )


def _gptj(view: ConfigView) -> ModelShape:
    """Attention and feed-forward beside each other behind one norm; biases in the feed-forward and the head only."""
    trunk = _trunk(view, vocab=50_400, positions=2048, tied=False)
    heads, head_dim = _heads(view, trunk.hidden)
    view.ignore("rotary", "scale_attn_weights", "n_ctx", "summary_type", "summary_use_proj")
    view.ignore("summary_activation", "summary_proj_to_labels", "summary_first_dropout")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        names=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        out_name="attn.out_proj",
        rotary_dim=view.int("rotary_dim", 64) if view.has("rotary_dim") else 64,
        dropout=view.float("attn_pdrop", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.maybe_int("n_inner", None) or 4 * trunk.hidden,
        gated=False,
        activation=view.str("activation_function", "gelu_new"),
        names=("mlp.fc_in", "mlp.fc_out"),
        up_bias=True,
        down_bias=True,
    )
    block = Block(
        mixer=attention,
        ffn=mlp,
        residual="parallel",
        norm=LAYER_NORM,
        norm_names=("ln_1",),
        dropout=view.float("resid_pdrop", 0.0, maximum=1.0),
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        embedding=Embedding(
            rows=trunk.vocab,
            size=trunk.hidden,
            name="transformer.wte",
            dropout=view.float("embd_pdrop", 0.0, maximum=1.0),
        ),
        head=Head(rows=trunk.vocab, tied=trunk.tied, bias=True, norm=LAYER_NORM, norm_name="transformer.ln_f"),
        prefix="transformer.h",
    )


def _attention_pattern(view: ConfigView, layers: int) -> list[str]:
    """GPT-Neo's `attention_types`, [[["global", "local"], 12]], written out layer by layer."""
    view.ignore("attention_layers")
    stated: Any = view.pairs("attention_types")
    kinds: list[str] = []
    for names, repeat in stated if stated is not None else [(["global", "local"], 12)]:
        kinds += list(names) * repeat
    if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
        raise view.fail("attention_types", f"global and local entries for {layers} layers")
    return [SLIDING if kind == "local" else FULL for kind in kinds]


def _gpt_neo(view: ConfigView) -> ModelShape:
    """Global and local attention in turn; no biases on q, k and v."""
    trunk = read_trunk(view, vocab=50_257, positions=2048, tied=True, layers_key="num_layers")
    heads, head_dim = _heads(view, trunk.hidden, "num_heads")
    window = view.int("window_size", 256)
    view.ignore("classifier_dropout", "summary_type", "summary_use_proj", "summary_activation")
    view.ignore("summary_proj_to_labels", "summary_first_dropout")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        names=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        out_name="attn.attention.out_proj",
        out_bias=True,
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.maybe_int("intermediate_size", None) or 4 * trunk.hidden,
        gated=False,
        activation=view.str("activation_function", "gelu_new"),
        names=("mlp.c_fc", "mlp.c_proj"),
        up_bias=True,
        down_bias=True,
    )
    dropout = view.float("resid_dropout", 0.0, maximum=1.0)
    blocks = blocks_by_kind(
        _attention_pattern(view, trunk.layers),
        lambda kind: Block(
            mixer=windowed(attention, kind, window),
            ffn=mlp,
            norm=LAYER_NORM,
            norm_names=("ln_1", "ln_2"),
            dropout=dropout,
        ),
    )
    return assemble(
        view,
        trunk,
        blocks,
        norm=LAYER_NORM,
        embedding=_learned_positions(view, trunk, view.float("embed_dropout", 0.0, maximum=1.0)),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=LAYER_NORM, norm_name="transformer.ln_f"),
        prefix="transformer.h",
    )


def _gpt_neox(view: ConfigView) -> ModelShape:
    """One fused matrix for q, k and v, a quarter of each head rotated, branches beside each other with two norms."""
    trunk = read_trunk(view, vocab=50_432, positions=2048, tied=False)
    heads, head_dim = _heads(view, trunk.hidden, "num_attention_heads")
    bias = view.bool("attention_bias", True)
    rotated = view.float("rotary_pct", 0.25, maximum=1.0)
    view.ignore("rotary_emb_base", "classifier_dropout")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        names=("attention.query_key_value",),
        out_name="attention.dense",
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=bias,
        rotary_dim=rotary_dim(view, head_dim, rotated),
        dropout=view.float("attention_dropout", 0.0, maximum=1.0),
    )
    mlp = Mlp(
        width=view.int("intermediate_size", 24_576),
        gated=False,
        activation=view.str("hidden_act", "gelu"),
        names=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        up_bias=True,
        down_bias=True,
    )
    dropout = view.float("hidden_dropout", 0.0, maximum=1.0)
    block = Block(
        mixer=attention,
        ffn=mlp,
        residual="parallel" if view.bool("use_parallel_residual", True) else "sequential",
        norm=LAYER_NORM,
        dropout=dropout,
    )
    return assemble(
        view,
        trunk,
        (block,) * trunk.layers,
        norm=LAYER_NORM,
        embedding=Embedding(rows=trunk.vocab, size=trunk.hidden, name="gpt_neox.embed_in", dropout=dropout),
        head=Head(rows=trunk.vocab, tied=trunk.tied, norm=LAYER_NORM, norm_name="gpt_neox.final_layer_norm"),
        prefix="gpt_neox.layers",
    )


READERS = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
}

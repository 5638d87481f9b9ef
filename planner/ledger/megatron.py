"""The transformer layer of Megatron-LM 3.0, with tensor and sequence parallelism and selective recomputation.

Korthikanti et al. 2022 (arXiv:2205.05198), sections 4.1 and 4.2; fused layer norm, fused scale-mask-softmax in 16 bit,
fused bias-gelu and bias-dropout-add (megatron/model/transformer.py, fused_softmax.py). Shapes are one rank's.

Letters: s sequence, b batch, h hidden, a heads, t tensor-parallel degree. Saved bytes of a layer in 16 bit:
                              no parallelism    tensor            tensor + sequence
    layer norm inputs (2)     4 sbh             4 sbh             4 sbh / t
    attention: input          2 sbh             2 sbh             2 sbh / t
      q, k, v; output's input 8 sbh             8 sbh / t         8 sbh / t
      softmax, mask, dropped  5 a s^2 b         5 a s^2 b / t     5 a s^2 b / t      none if recomputed
      dropout mask              sbh               sbh               sbh / t
    feed-forward: input       2 sbh             2 sbh             2 sbh / t
      gelu input, output     16 sbh            16 sbh / t        16 sbh / t
      dropout mask              sbh               sbh               sbh / t
    sum                      34 sbh            (10 + 24/t) sbh   34 sbh / t          + 5 a s^2 b (/ t)
and the fp32 statistics of the two norms, 16 bytes a token, which the paper leaves out.
"""

from __future__ import annotations

from planner.errors import NotCovered
from planner.ledger.embedding import embed
from planner.ledger.norm import normalise
from planner.ledger.operations import Operations
from planner.ledger.tape import Tensor
from planner.model.shape import Attention, Block, Embedding, Head, Mlp

__all__ = ["megatron_block", "megatron_embed", "megatron_loss"]


def megatron_embed(t: Operations, spec: Embedding) -> Tensor:
    """Vocabulary-parallel embedding; with sequence parallelism its output is scattered over the sequence."""
    x = embed(t, spec)
    return t.copy(x, ("B", _stream(t), x.dims[2]), "scatter") if t.sequence_parallel else x


def megatron_block(t: Operations, block: Block, x: Tensor) -> Tensor:
    """Pre-norm attention and feed-forward, each followed by dropout and the residual."""
    attention, mlp = block.mixer, block.ffn
    if block.residual != "sequential" or not isinstance(attention, Attention) or not isinstance(mlp, Mlp):
        raise NotCovered("the megatron implementation covers sequential blocks of attention and a dense feed-forward.")
    x = t.add(x, t.dropout(_attention(t, attention, normalise(t, block.norm, block.norm_names[0], x)), block.dropout))
    return t.add(x, t.dropout(_feed_forward(t, mlp, normalise(t, block.norm, block.norm_names[1], x)), block.dropout))


def megatron_loss(t: Operations, head: Head, x: Tensor) -> Tensor:
    """Vocabulary-parallel logits in fp32 and cross-entropy in place over them.

    mpu/cross_entropy.py: the exponentials overwrite the logits, are kept, and are overwritten by their gradient.
    """
    logits = _column(t, head.name if not head.tied else "embedding", x, t.dim("V", head.rows), bias=False)
    t.module = "loss"
    upcast = t.to(logits, "fp32")
    del logits
    return t.apply("vocab-parallel cross-entropy", [upcast], [(("B", "S"), "fp32")], saves=[upcast])[0]


def _stream(t: Operations) -> str:
    """The sequence dim of the residual stream: a share of S under sequence parallelism."""
    return t.dim("S/t", t.sizes["S"] // t.tensor) if t.sequence_parallel else "S"


def _attention(t: Operations, spec: Attention, x: Tensor) -> Tensor:
    width, group = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    packed = _column(t, "self_attention.query_key_value", x, t.dim("QKV", width + 2 * group), bias=spec.q_bias)
    heads, groups, size = t.dim("A", spec.heads), t.dim("K", spec.kv_heads), t.dim("D", spec.head_dim)
    query, key, value = t.split(packed, [("B", heads, "S", size), ("B", groups, "S", size), ("B", groups, "S", size)])
    del packed

    def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _core(t, spec, query, key, value)

    t.module = "attention"
    t.selected = t.selective
    inner = t.checkpoint(core, query, key, value) if t.selective else core(query, key, value)
    del query, key, value
    return _row(t, "self_attention.dense", inner, x.dims[2], bias=spec.out_bias)


def _core(t: Operations, spec: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores, one fused scale-mask-softmax kernel, dropout, product with the values; FlashAttention in one kernel."""
    width = t.dim("AD", spec.heads * spec.head_dim)
    if t.attention != "eager":
        statistics = [(query.dims[:3], "fp32")]
        return t.apply(
            "attention",
            [query, key, value],
            [(("B", "S", width), query.dtype)],
            saves=[query, key, value],
            saves_outputs=(0,),
            extra_saved=statistics,
            backward_scratch=[(query.dims, "fp32"), *statistics],
        )[0]
    heads = query.dims[1]
    if spec.kv_heads != spec.heads:
        key, value = (t.copy(x, ("B", heads, *x.dims[2:]), "repeat") for x in (key, value))
    scores = t.map("softmax", t.matmul(query, key, ("B", heads, "S", "S")), saves="output")
    scores = t.dropout(scores, spec.dropout)
    result = t.matmul(scores, value, query.dims)
    del scores
    return t.copy(result, ("B", "S", width))


def _feed_forward(t: Operations, spec: Mlp, x: Tensor) -> Tensor:
    width = t.dim("F", spec.width)
    if not spec.gated:
        inner = t.map(spec.activation, _column(t, "mlp.dense_h_to_4h", x, width, bias=spec.up_bias))
    else:
        both = _column(t, "mlp.dense_h_to_4h", x, t.dim("2F", 2 * spec.width), bias=spec.up_bias)
        inner = t.apply(f"{spec.activation} gate", [both], [(("B", "S", width), both.dtype)], saves=[both])[0]
        del both
    return _row(t, "mlp.dense_4h_to_h", inner, x.dims[2], bias=spec.down_bias)


def _column(t: Operations, name: str, x: Tensor, out: str, *, bias: bool) -> Tensor:
    """A column-parallel product. Under sequence parallelism x is gathered for it, and again for its gradient."""
    t.module = name
    inputs = [x, t.weight(name + ".weight", (out, x.dims[2]))]
    if bias:
        inputs.append(t.weight(name + ".bias", (out,)))
    gathered = [(("B", "S", x.dims[2]), x.dtype)] if t.sequence_parallel else []
    return t.apply(
        "column-parallel linear",
        inputs,
        [(("B", "S", out), x.dtype)],
        saves=[x],
        scratch=gathered,
        backward_scratch=gathered * 2,
    )[0]


def _row(t: Operations, name: str, x: Tensor, out: str, *, bias: bool) -> Tensor:
    """A row-parallel product, summed over the ranks; under sequence parallelism each keeps its share of positions."""
    t.module = name
    inputs = [x, t.weight(name + ".weight", (out, x.dims[2]))]
    if bias:
        inputs.append(t.weight(name + ".bias", (out,)))
    whole = [(("B", "S", out), x.dtype)] if t.sequence_parallel else []
    return t.apply(
        "row-parallel linear",
        inputs,
        [(("B", _stream(t), out), x.dtype)],
        saves=[x],
        scratch=whole,
        backward_scratch=whole,
    )[0]

"""The shape of a model, as frozen values: blocks by kind, in order, and what stands before and after them.

A shape says which modules exist and how large they are; it holds no byte counts. The ledger reads it twice: once
for the weights it owns (`planner.ledger.weights`) and once for what a forward pass keeps (`planner.ledger`).

Names are the module paths of the reference implementation (Hugging Face `transformers`), because adapters are
targeted by them: `self_attn.q_proj`, `attn.c_attn`, `mlp.experts`.

Letters used below and in the ledger:
    H hidden size            A query heads         K key/value heads     D head size (query and key)
    E size of a value head   F feed-forward width  V vocabulary          X routed experts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Attention",
    "Block",
    "Component",
    "Embedding",
    "GatedDeltaNet",
    "Head",
    "LatentAttention",
    "Mamba1",
    "Mamba2",
    "Mixer",
    "Mlp",
    "ModelShape",
    "Moe",
    "Norm",
    "Readout",
    "Tower",
    "Weight",
    "WeightKind",
]

Component = Literal[
    "embed_in",
    "lm_head",
    "attention",
    "ssm",
    "mlp_dense",
    "experts_routed",
    "experts_shared",
    "router",
    "norm",
    "vision_or_audio",
    "other",
]
WeightKind = Literal["linear", "embedding", "norm", "bias", "conv", "experts", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter tensor: its path inside the module that owns it, its shape, and what it is.

    kind: `linear` is the matrix of an nn.Linear or Conv1D (what LoRA targets and 4-bit formats replace), stored
    (out, in); `experts` a stacked 3-D expert tensor; `bias`, `norm`, `embedding`, `conv`, `other` as named.
    """

    name: str
    shape: tuple[int, ...]
    component: Component
    kind: WeightKind
    frozen: bool = False  # never trains, whatever the method (fixed sinusoids)

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A normalisation: `rmsnorm` (weight), `rmsnorm_1p` (Gemma: weight added to one, in fp32), `layernorm`.

    affine False means no weights at all (OLMo 1); bias only exists for layernorm.
    fp32 says that the reference implementation upcasts its input and normalises in fp32 by hand; native kernels
    (torch.nn.LayerNorm, torch.nn.RMSNorm) upcast inside one kernel and save only statistics.
    """

    kind: Literal["rmsnorm", "rmsnorm_1p", "layernorm"]
    bias: bool = False
    affine: bool = True
    fp32: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention with A query heads of size D and K key/value heads (MHA, GQA, MQA by K)."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None  # E; None means D
    names: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one name: fused
    out_name: str = "self_attn.o_proj"
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    out_bias: bool = False
    rotary_dim: int = 0  # elements of each head that are rotated; 0 means no rotary embedding
    position_bias: Literal["none", "alibi", "relative"] = "none"  # relative: T5 buckets
    relative_buckets: int = 0  # > 0 where this block owns the bucket table
    qk_norm: Norm | None = None
    # head: one norm shared by all heads; width: one over all heads together (OLMo 2); heads: one for each head
    # with weights of its own (Cohere, StableLM)
    qk_norm_over: Literal["head", "width", "heads"] = "head"
    qk_norm_names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    window: int | None = None  # sliding window in tokens, this block only
    chunk: int | None = None  # chunked local attention in tokens (Llama 4)
    softcap: bool = False  # tanh on the scores, which fused kernels of torch do not have
    sinks: bool = False  # one learned logit per query head (gpt-oss)
    sinks_name: str = "sinks"
    gate: bool = False  # query projection is twice as wide and gates the output (Qwen3-Next)
    causal: bool = True
    cross: bool = False  # keys and values come from the encoder, of size kv_input
    kv_input: int | None = None  # size of the key/value input; None means H
    dropout: float = 0.0
    shares_kv: bool = False  # reuses the keys and values of an earlier block (no k, v projections)
    out_size: int | None = None  # rows of the output projection; None means H
    value_from_key: bool = (
        False  # no value projection: values are the projected keys before norm and rotation (Gemma 4)
    )
    value_norm: bool = False  # values are normalised too, without weights (Gemma 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2/V3, Kimi K2): keys and values from one low-rank latent."""

    heads: int
    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False  # on q_a_proj, kv_a_proj and o_proj
    norm: Norm = field(default_factory=lambda: Norm(kind="rmsnorm"))
    index_heads: int = 0  # > 0: the sparse-attention indexer of DeepSeek-V3.2 and GLM-5
    index_dim: int = 0
    index_top_k: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba1:
    """Selective state space of Mamba 1 (and Jamba, Falcon-Mamba, which normalise dt, B and C)."""

    inner: int
    state: int
    conv: int
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False
    norms: Literal["none", "weighted", "unweighted"] = "none"
    name: str = "mixer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """State-space duality of Mamba 2: heads x head_dim = inner, with groups sharing B and C."""

    inner: int
    heads: int
    head_dim: int
    state: int
    groups: int
    conv: int
    conv_bias: bool = True
    proj_bias: bool = False
    chunk: int = 256
    name: str = "mixer"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet:
    """Gated delta rule (Qwen3-Next, Qwen3.5): K key heads, A value heads, a matrix state for each value head.

    projections: `fused` has in_proj_qkvz and in_proj_ba; `split` has in_proj_qkv, in_proj_z, in_proj_b, in_proj_a.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int
    projections: Literal["fused", "split"] = "fused"
    name: str = "linear_attn"


Mixer = Attention | LatentAttention | Mamba1 | Mamba2 | GatedDeltaNet


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A dense feed-forward layer: `gated` (gate, up, down) or plain (up, down).

    names: (gate, up, down), (fused gate-and-up, down) or (up, down).
    activation: the `hidden_act` of the reference implementation: silu, gelu, gelu_new, gelu_pytorch_tanh, relu, ...
    """

    width: int
    gated: bool
    activation: str
    names: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    up_bias: bool = False
    down_bias: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A routed feed-forward layer: X experts of width `width`, `top_k` of them a token, shared experts beside them."""

    experts: int
    top_k: int
    width: int
    activation: str
    gated: bool = True
    expert_bias: bool = False
    router_name: str = "mlp.gate"
    router_bias: bool = False  # an nn.Linear bias
    score_bias: bool = False  # an additional trained (X,) vector registered as a parameter
    experts_name: str = "mlp.experts"
    stacked: bool = True  # one 3-D tensor for all experts (transformers >= 5) or X separate linears
    shared: Mlp | None = None
    shared_gate: str | None = None  # module path of the sigmoid gate (H -> 1) on the shared experts
    jitter: float = 0.0
    expert_names: tuple[str, ...] = ("gate_up_proj", "down_proj")  # inside `experts_name`, or inside one expert
    # how stacked experts are stored: `out-in` (X, out, in); `in-out` (X, in, out), gpt-oss; `rows` (X x F, H), DBRX
    layout: Literal["out-in", "in-out", "rows"] = "out-in"
    score_bias_name: str = ""  # path of the vector of `score_bias`; empty: e_score_correction_bias of the router
    latent: int | None = None  # experts work on a projection of this width instead of H (Nemotron 3)
    latent_names: tuple[str, str] = ("mixer.fc1_latent_proj", "mixer.fc2_latent_proj")
    latent_bias: bool = False
    every_expert: bool = False  # each expert computes each token, weighted by zero unless chosen (Llama 4)
    # whose arithmetic the router follows (`planner.ledger.moe`); empty: its activations are not described
    routing: Literal["", "mixtral", "qwen", "granite", "gpt_oss", "deepseek_v2", "deepseek_v3", "ernie", "minimax"] = ""
    normalises_weights: bool = False  # norm_topk_prob: the weights of a token's experts are made to sum to one
    groups: int = 1  # n_group: experts are chosen within the best of these groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One residual block.

    residual:
      `sequential`  x + mixer(norm_1(x)); x + ffn(norm_2(x))          Llama, GPT-2
      `parallel`    x + mixer(norm_1(x)) + ffn(norm_2(x) or the same norm_1(x) when norm_2 is None)  NeoX, GPT-J, Falcon
      `post`        norm_1(x + mixer(x)); norm_2(x + ffn(x))          BERT
      `sandwich`    x + post_1(mixer(norm_1(x))); ...                 Gemma 2, 3
      `post_only`   x + post_1(mixer(x)); x + post_2(ffn(x))          OLMo 2
      `single`      x + mixer(norm_1(x)), or x + ffn(norm_1(x)) when there is no mixer     Mamba, Nemotron-H
    """

    mixer: Mixer | None
    ffn: Mlp | Moe | None
    residual: Literal["sequential", "parallel", "post", "sandwich", "post_only", "single"] = "sequential"
    norm: Norm | None = None
    norm_names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    post_norm_names: tuple[str, ...] = ()
    cross: Attention | None = None  # cross-attention between mixer and ffn
    cross_norm_name: str = ""
    dropout: float = 0.0  # on each branch before it is added
    mixer_dropout: bool = True  # False: `dropout` is on the feed-forward branch alone (DistilBERT)
    branch_scaled: bool = False  # each branch is multiplied by a constant before it is added (Granite)
    residual_fp32: bool = False  # the stream between blocks is fp32, whatever format the weights have (Mamba)
    extra: tuple[Weight, ...] = ()  # weights of parts that have no kind of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token embedding and what is added to it."""

    rows: int  # stored rows, padding included
    size: int
    name: str = "model.embed_tokens"
    positions: int = 0  # rows of a learned position table
    position_size: int | None = None  # None: the same as `size`
    position_name: str = ""
    types: int = 0  # token-type table (BERT)
    type_name: str = ""
    norm: Norm | None = None
    norm_name: str = ""
    projection: int | None = None  # a linear from `size` to this size (OPT-350m)
    projection_name: str = ""
    scaled: bool = False  # multiplied by a constant (Gemma)
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Readout:
    """What an encoder makes of its last hidden states before the output matrix, and what it is trained on.

    task: `masked`, the tokens at every position (masked language modelling); `labels`, one class for each example;
        `pairs`, which image of the batch goes with which text (CLIP).
    dense, norm_name: a layer of size (H, H), followed by `activation`, and a layer norm after it; empty: none.
    """

    task: Literal["masked", "labels", "pairs"]
    first: bool = False  # only the first position goes on
    dense: str = ""
    dense_bias: bool = True
    activation: str = ""
    norm: Norm | None = None
    norm_name: str = ""
    dropouts: tuple[float, float] = (0.0, 0.0)  # before the dense layer, and before the output matrix
    upcasts: bool = False  # logits turn to fp32 before the loss
    classes: int = 0
    classifier: str = ""  # the (classes, H) output matrix of `labels`


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Final norm and output projection. rows 0: the model returns hidden states, there are no logits."""

    rows: int
    tied: bool
    bias: bool = False
    norm: Norm | None = None
    norm_name: str = "model.norm"
    name: str = "lm_head"
    softcap: bool = False
    scaled: bool = False  # logits multiplied by a constant (Cohere, Granite)
    projection: int | None = None
    projection_name: str = ""
    extra: tuple[Weight, ...] = ()
    dropout: float = 0.0  # between the final norm and the output projection (T5)
    readout: Readout | None = None  # encoders: what they are trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A further stack beside the main one: an encoder, a vision or an audio tower.

    tokens: how many positions it processes for one example (Whisper 1500, CLIP 257); None: as many as the plan says.
    extra: patch embedding, class token, projector: weights with no block kind.
    """

    name: str
    role: Literal["encoder", "vision", "audio", "text"]
    hidden: int
    blocks: tuple[Block, ...]
    embedding: Embedding | None = None
    tokens: int | None = None
    final_norm: Norm | None = None
    final_norm_name: str = ""
    extra: tuple[Weight, ...] = ()
    shares_embedding: bool = False  # reads tokens through the table of the main model (T5)
    dropout: float = 0.0  # on what enters the first block
    final_dropout: float = 0.0  # on what leaves the final norm


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A whole model. `blocks` are the main stack, in order; equal blocks are equal values.

    uncovered: parts whose weights are counted but whose activations or caches the ledger does not describe.
    """

    name: str
    model_type: str
    hidden: int
    blocks: tuple[Block, ...]
    embedding: Embedding | None
    head: Head | None
    towers: tuple[Tower, ...] = ()
    extra: tuple[Weight, ...] = ()
    max_positions: int | None = None
    dtype: str | None = None  # the format of the published checkpoint
    prefix: str = "model.layers"
    uncovered: tuple[str, ...] = ()
    source: str = ""
    assumed: tuple[str, ...] = ()  # "key=value" for sizes the config leaves to the defaults of the reference class
    quantization: str | None = None  # how the published checkpoint is quantised; shapes are those before it
    tokens: int | None = None  # positions of the main stack where the model fixes them (ViT: patches and class token)
    image: tuple[int, int, int] | None = None  # channels, height and width where each example has one image

    def __hash__(self) -> int:
        """Of a few telling fields: equal shapes hash equally, and hashing a hundred blocks for a cache is not free."""
        return hash((self.name, self.model_type, self.hidden, len(self.blocks), self.blocks[:1], self.embedding))

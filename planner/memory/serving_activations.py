"""The largest transient of one forward pass without gradients: what lives beside weights and cache while it runs.

Elements on one rank for T tokens, b bytes each; a layer frees its buffers before the next one runs:

    always       residual stream T H, and its normalised copy T H
    attention    queries T A D (2 A D with an output gate), keys T K D, values T K E, output T A E
    latent       queries T A (n + r), expanded keys T A (n + r), latents expanded T A (n + E), output T A E
    state space  in-projection T R (R its rows), output T I
    dense        gate and up T 2F, their product T F
    routed       for each of the k experts of a token: its input H, 2F, F and its output H;  T k (2H + 3F), and the
                 shared expert's 3F
    logits       rows x V in b bytes, and a copy in fp32

A, K, F and I are divided by the tensor degree; logits are gathered whole on the rank that samples. Scores are never
stored: all engines here run fused attention.
"""

from __future__ import annotations

from functools import lru_cache

from planner.model.shape import Attention, Block, GatedDeltaNet, LatentAttention, Mamba1, Mamba2, Mlp, ModelShape, Moe

__all__ = ["forward_bytes", "logits_bytes"]


def forward_bytes(shape: ModelShape, tokens: int, tensor: int = 1, *, element_bytes: int = 2) -> int:
    """Bytes of the largest moment inside the blocks of the main stack, for `tokens` tokens on one rank."""
    return tokens * element_bytes * _widest(shape, tensor)


def logits_bytes(shape: ModelShape, rows: int, *, element_bytes: int = 2) -> int:
    """Bytes of the logits of `rows` positions in the weights' format, and of their fp32 copy."""
    return 0 if shape.head is None else rows * shape.head.rows * (element_bytes + 4)


@lru_cache(maxsize=512)
def _widest(shape: ModelShape, tensor: int) -> int:
    """Elements for each token at the widest moment of any block."""
    inside = max((_block(block, shape.hidden, tensor) for block in set(shape.blocks)), default=0)
    return 2 * shape.hidden + inside


def _block(block: Block, hidden: int, tensor: int) -> int:
    return max(_mixer(block, tensor), _feed_forward(block, hidden, tensor))


def _mixer(block: Block, tensor: int) -> int:
    match block.mixer:
        case Attention() as a:
            value_dim = a.value_dim or a.head_dim
            heads, kv_heads = -(-a.heads // tensor), max(1, -(-a.kv_heads // tensor))
            queries = heads * a.head_dim * (2 if a.gate else 1)
            return queries + kv_heads * (a.head_dim + value_dim) + heads * value_dim
        case LatentAttention() as a:
            heads = -(-a.heads // tensor)
            return heads * (2 * (a.nope_dim + a.rope_dim) + a.nope_dim + 2 * a.value_dim)
        case Mamba1() as m:
            return 3 * -(-m.inner // tensor)
        case Mamba2() as m:
            return (3 * m.inner + m.heads) // tensor + 2 * -(-m.groups // tensor) * m.state
        case GatedDeltaNet() as m:
            keys, values = m.key_heads * m.key_dim, m.value_heads * m.value_dim
            return -(-(2 * keys + 3 * values) // tensor)
        case None:
            return 0


def _feed_forward(block: Block, hidden: int, tensor: int) -> int:
    match block.ffn:
        case Mlp() as mlp:
            return -(-mlp.width * (3 if mlp.gated else 2) // tensor)
        case Moe() as moe:
            inputs = moe.latent or hidden
            routed = moe.top_k * (2 * inputs + -(-moe.width * (3 if moe.gated else 2) // tensor))
            shared = moe.shared
            return routed + (-(-shared.width * (3 if shared.gated else 2) // tensor) if shared is not None else 0)
        case None:
            return 0

"""The part of one block's weight that one tensor-parallel rank holds, and the roles that decide it.

Megatron-LM (arXiv:1909.08053) and vLLM's layers, read in 0.33:

    query, up, gate, in-projections   by rows                output, down    by columns; their biases stay whole
    key, value                        by rows, at least one head on a rank
    experts                           by their width, or whole experts over `expert` ranks
    norms, routers, latent (MLA) down-projections, the indexer             replicated
"""

from __future__ import annotations

from planner.model.shape import Attention, Block, GatedDeltaNet, LatentAttention, Mamba1, Mamba2, Moe, Weight

__all__ = ["expert_matrix", "is_down", "rank_shape"]


def is_down(module: str, block: Block) -> bool:
    """Whether a module is the last projection of the block's feed-forward part, which is divided by columns."""
    match block.ffn:
        case Moe() as moe:
            last = [moe.expert_names[-1]]
            if moe.shared is not None:
                last.append(moe.shared.names[-1])
            return any(module.endswith(name) for name in last)
        case None:
            return False
        case mlp:
            return module == mlp.names[-1]


def expert_matrix(sizes: tuple[int, ...], moe: Moe) -> tuple[int, int, int]:
    """(experts, rows, columns) of a stacked tensor, whatever its layout."""
    if len(sizes) == 2:
        rows, inner = sizes
        return moe.experts, rows // moe.experts, inner
    count, *matrix = sizes
    out, inner = matrix if moe.layout != "in-out" else reversed(matrix)
    return count, out, inner


def rank_shape(weight: Weight, block: Block, tensor: int, expert: int) -> tuple[int, ...]:
    """The shape of the part of one block's weight that one tensor-parallel rank holds."""
    sizes = weight.shape
    if tensor == expert == 1 or (weight.kind == "norm" and not _divided_norm(weight, block)):
        return sizes
    module, _, leaf = weight.name.rpartition(".")
    bias = weight.kind == "bias"
    match weight.component:
        case "router" | "norm":
            return sizes
        case "attention":
            for mixer in (block.mixer, block.cross):
                if isinstance(mixer, Attention) and (module in mixer.names or module == mixer.out_name):
                    return _attention_shape(sizes, module, mixer, tensor, bias)
            if isinstance(block.mixer, LatentAttention):
                return _latent_shape(sizes, module, tensor)
            return (-(-sizes[0] // tensor), *sizes[1:]) if weight.kind == "other" else sizes
        case "ssm":
            return _state_space_shape(sizes, module or leaf, block, tensor)
        case "mlp_dense" | "experts_shared":
            if len(sizes) == 2 and min(sizes) == 1:
                return sizes  # the gate of shared experts
            if not is_down(module, block):
                return (-(-sizes[0] // tensor), *sizes[1:])
            return sizes if bias else (*sizes[:-1], -(-sizes[-1] // tensor))
        case "experts_routed":
            return _experts_shape(weight, sizes, block, tensor, expert)
        case _:
            return sizes


def _divided_norm(weight: Weight, block: Block) -> bool:
    return isinstance(block.mixer, Mamba2) and weight.name == f"{block.mixer.name}.norm.weight"


def _attention_shape(sizes: tuple[int, ...], module: str, a: Attention, tensor: int, bias: bool) -> tuple[int, ...]:
    value_dim = a.value_dim or a.head_dim
    heads, kv_heads = -(-a.heads // tensor), max(1, -(-a.kv_heads // tensor))
    if module == a.out_name:
        return sizes if bias else (sizes[0], heads * value_dim)
    q = heads * a.head_dim * (2 if a.gate else 1)
    k, v = kv_heads * a.head_dim, kv_heads * value_dim
    match len(a.names):
        case 1:
            rows = q + k + v
        case 2:
            rows = (q, k + v)[a.names.index(module)]
        case _:
            rows = (q, k, v)[a.names.index(module)]
    return (rows, *sizes[1:])


def _latent_shape(sizes: tuple[int, ...], module: str, tensor: int) -> tuple[int, ...]:
    if module.endswith(("q_proj", "q_b_proj", "kv_b_proj")):
        return (-(-sizes[0] // tensor), *sizes[1:])
    if module.endswith("o_proj") and len(sizes) == 2:
        return (sizes[0], -(-sizes[1] // tensor))
    return sizes


def _state_space_shape(sizes: tuple[int, ...], module: str, block: Block, tensor: int) -> tuple[int, ...]:
    mixer = block.mixer
    part = module.rpartition(".")[2]
    if part == "out_proj" or (part == "x_proj" and isinstance(mixer, Mamba1)):
        return (sizes[0], -(-sizes[1] // tensor)) if len(sizes) == 2 else sizes
    if isinstance(mixer, Mamba2) and part in ("in_proj", "conv1d"):
        whole = 2 * mixer.groups * mixer.state
        shared = 2 * -(-mixer.groups // tensor) * mixer.state  # groups below the degree are replicated
        return (-(-(sizes[0] - whole) // tensor) + shared, *sizes[1:])
    if isinstance(mixer, (Mamba1, Mamba2, GatedDeltaNet)):
        return (-(-sizes[0] // tensor), *sizes[1:])
    return sizes


def _experts_shape(weight: Weight, sizes: tuple[int, ...], block: Block, tensor: int, expert: int) -> tuple[int, ...]:
    """Whole experts over `expert` ranks; what is left of the tensor degree divides their width."""
    moe = block.ffn
    assert isinstance(moe, Moe), "routed experts belong to a routed layer"
    width = max(1, tensor // expert) if expert > 1 else tensor
    down = weight.name.removesuffix("_bias").endswith(moe.expert_names[-1]) or is_down(
        weight.name.rpartition(".")[0], block
    )
    if not moe.stacked:  # one of X equal linears: the share of a rank, in rows, is the same for each
        share = tensor if expert == 1 else expert * width
        axis = -1 if down and weight.kind != "bias" else 0
        return tuple(-(-size // share) if index == axis % len(sizes) else size for index, size in enumerate(sizes))
    if len(sizes) == 2 and weight.kind == "experts":  # (X F, H)
        return (-(-moe.experts // expert) * -(-moe.width // width), sizes[1])
    count = -(-sizes[0] // expert)
    if weight.kind == "bias":
        return (count, sizes[1]) if down else (count, -(-sizes[1] // width))
    first, second = sizes[-2:]
    rows_first = (moe.layout == "out-in") != down
    return (count, -(-first // width), second) if rows_first else (count, first, -(-second // width))

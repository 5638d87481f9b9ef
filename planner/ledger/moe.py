"""Routed feed-forward layers: the router, the experts and what is shared beside them.

transformers 5 runs all experts of a layer in two grouped matrix products (integrations/moe.py, "grouped_mm", its
default): the rows of the tokens are gathered once for each expert they go to, in the order of the experts, so nothing
depends on how evenly the router spreads the tokens, only on how many experts a token takes.

Letters: B batch, S sequence, H hidden, X experts, k experts a token takes, F width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.errors import NotCovered
from planner.ledger.mlp import activate, feed_forward
from planner.ledger.operations import Operations
from planner.ledger.tape import Dims, Parameter, Tensor
from planner.model.shape import Moe

__all__ = ["mixture_of_experts"]

Routing = tuple[Tensor, Tensor, Tensor]  # logits, weights of the chosen experts, and their indices


def mixture_of_experts(t: Operations, moe: Moe, x: Tensor, hidden: str) -> Tensor:
    """The layer's output for x, (B, S, H)."""
    route = _ROUTERS.get(moe.routing)
    if route is None or moe.layout == "rows" or moe.every_expert:
        raise NotCovered("the activations of this kind of mixture of experts are not in the ledger.")
    if not moe.stacked:
        return _one_by_one(t, moe, x, hidden)
    if moe.jitter:
        noise = t.constant("jitter", x.dims, x.dtype)
        (x,) = t.apply("mul_", [x], [(x.dims, x.dtype)], in_place=True, saves=[noise])
        del noise
    shared = None
    if moe.shared is not None and (moe.shared_gate is not None or moe.routing == "ernie"):
        shared = feed_forward(t, moe.shared, x, hidden)
    residual = x
    logits, weights, index = route(t, moe, x)
    if moe.latent:
        x = t.linear(moe.latent_names[0], x, t.dim("latent", moe.latent), bias=moe.latent_bias)
    x = _experts(t, moe, x, index, weights)
    if moe.latent:
        x = t.linear(moe.latent_names[1], x, hidden, bias=moe.latent_bias)
    del logits  # the block's `_`
    if moe.shared is None:
        return x
    if shared is None:
        return t.add(x, feed_forward(t, moe.shared, residual, hidden))
    if moe.shared_gate is not None:
        t.module = moe.shared_gate
        shared = t.mul(t.map("sigmoid", t.linear(moe.shared_gate, residual, "1"), saves="output"), shared)
    x = t.add(x, shared)
    return x


def _one_by_one(t: Operations, moe: Moe, x: Tensor, hidden: str) -> Tensor:
    """Experts in a Python loop, each on the rows routed to it: transformers 4.x, modeling_mixtral.py, modeling_qwen2_moe.py.

    The rows of an expert depend on the router; here every expert gets its even share, ceil(B S k / X). What is saved
    adds up to the same whatever the share is; what passes by for one expert at a time does not.
    """
    if (
        moe.routing not in ("mixtral", "qwen")
        or not moe.gated
        or moe.expert_bias
        or moe.jitter
        or moe.shared is not None
    ):
        raise NotCovered("this mixture of experts is covered as transformers 5 runs it, not as a loop over modules.")
    logits, weights, index = _ROUTERS[moe.routing](t, moe, x)
    weights = t.to(weights, x.dtype)
    width = t.dim("F", moe.width)
    share = -(-t.sizes["B"] * t.sizes["S"] * moe.top_k // moe.experts)
    rows = t.dim("routed", share)
    t.module = moe.experts_name
    result = t.constant("zeros", x.dims, x.dtype)
    mask = t.constant("expert mask", (*index.dims, t.dim("X", moe.experts)), "int64")
    gate_name, up_name, down_name = moe.expert_names
    for expert in range(moe.experts):
        name = f"{moe.experts_name}.{expert}"
        picked = t.constant("where", ("2", rows), "int64")
        state = t.apply("index", [x], [((rows, hidden), x.dtype)], saves=[picked])[0]
        inner = t.mul(
            activate(t, moe.activation, t.linear(f"{name}.{gate_name}", state, width)),
            t.linear(f"{name}.{up_name}", state, width),
        )
        current = t.linear(f"{name}.{down_name}", inner, hidden)
        del inner
        share_of = t.apply("index", [weights], [((rows, "1"), weights.dtype)], saves=[picked])[0]
        current = t.mul(current, share_of, (rows, hidden))
        result = t.apply(
            "index_add_", [result, current], [(x.dims, x.dtype)], saves=[picked], alias=[True, False], in_place=True
        )[0]
    del mask, logits
    return result


# ---- routers ------------------------------------------------------------------------------------------------------


def _logits(t: Operations, moe: Moe, x: Tensor) -> Tensor:
    t.module = moe.router_name
    experts = t.dim("X", moe.experts)
    weight = t.weight(f"{moe.router_name}.weight", (experts, x.dims[-1]))
    bias = t.weight(f"{moe.router_name}.bias", (experts,)) if moe.router_bias else None
    return t.product(x, weight, (*x.dims[:-1], experts), bias)


def _logits_in_fp32(t: Operations, moe: Moe, x: Tensor) -> Tensor:
    """x.float() @ weight.float().T: the fp32 copy of x is kept for the weight's gradient."""
    t.module = moe.router_name
    experts = t.dim("X", moe.experts)
    weight = t.weight(f"{moe.router_name}.weight", (experts, x.dims[-1]))
    upcast: Parameter | Tensor = weight
    if weight.dtype != "fp32":
        (upcast,) = t.apply("to", [weight], [(weight.dims, "fp32")])
    x = t.to(x, "fp32")
    dims = (*x.dims[:-1], experts)
    if isinstance(upcast, Parameter):
        return t.product(x, upcast, dims)
    # a linear's own order: the weight's gradient is made before that of x
    saves = [upcast if x.requires_grad else None, x if upcast.requires_grad else None]
    return t.apply("linear", [upcast, x], [(dims, "fp32")], saves=saves)[0]


def _top_k(t: Operations, moe: Moe, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of X scores and their int64 indices; its gradient is zeros with k values written in."""
    dims = (*scores.dims[:-1], t.dim("k", moe.top_k))
    index = t.constant("topk indices", dims, "int64")
    (values,) = t.apply("topk", [scores], [(dims, scores.dtype)], saves=[index])
    return values, index


def _gather(t: Operations, scores: Tensor, index: Tensor) -> Tensor:
    return t.apply("gather", [scores], [(index.dims, scores.dtype)], saves=[index])[0]


def _sum_to_one(t: Operations, weights: Tensor) -> Tensor:
    """weights /= weights.sum(-1, keepdim=True): in place, so the undivided weights are copied for the gradient."""
    total = t.apply("sum", [weights], [((*weights.dims[:-1], "1"), weights.dtype)])[0]
    return t.apply(
        "div_",
        [weights, total],
        [(weights.dims, weights.dtype)],
        saves=[total],
        extra_saved=[(weights.dims, weights.dtype)],
        in_place=True,
        raw_gradients=[None, (weights.dims, weights.dtype)],
    )[0]


def _mixtral(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits(t, moe, x)
    scores = t.map("softmax", t.to(logits, "fp32"), saves="output")
    weights, index = _top_k(t, moe, scores)
    return logits, _sum_to_one(t, weights), index


def _qwen(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits(t, moe, x)
    scores = t.map("softmax", t.to(logits, "fp32"), saves="output")
    weights, index = _top_k(t, moe, scores)
    if moe.normalises_weights:
        weights = _sum_to_one(t, weights)
    return logits, t.to(weights, logits.dtype), index


def _granite(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = t.to(_logits(t, moe, x), "fp32")
    values, index = _top_k(t, moe, logits)
    return logits, t.to(t.map("softmax", values, saves="output"), x.dtype), index


def _gpt_oss(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits(t, moe, x)
    values, index = _top_k(t, moe, logits)
    return logits, t.map("softmax", values, saves="output"), index


def _deepseek_v2(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits_in_fp32(t, moe, x)
    scores = t.map("softmax", logits, saves="output")
    if moe.groups > 1:
        scores = _within_groups(t, moe, scores)
    weights, index = _top_k(t, moe, scores)
    return logits, t.scale(weights), index


def _deepseek_v3(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits_in_fp32(t, moe, x)
    scores = t.map("sigmoid", logits, saves="output")
    index = t.constant("topk indices", (*x.dims[:-1], t.dim("k", moe.top_k)), "int64")
    choice = t.constant("scores for choice", scores.dims, "fp32")  # nothing comes back through it: only the indices
    weights = _gather(t, scores, index)
    if moe.normalises_weights:
        total = t.apply("sum", [weights], [((*weights.dims[:-1], "1"), "fp32")])[0]
        total = t.scale(total, "add scalar")
        weights = t.apply(
            "div_",
            [weights, total],
            [(weights.dims, "fp32")],
            saves=[total],
            extra_saved=[(weights.dims, "fp32")],
            in_place=True,
            raw_gradients=[None, (weights.dims, "fp32")],
        )[0]
        del total
    weights = t.scale(weights)
    del choice
    return logits, weights, index


def _within_groups(t: Operations, moe: Moe, scores: Tensor) -> Tensor:
    """Scores with all but the best groups' experts masked out: masked_fill keeps a bool mask as large as they are."""
    return t.apply("masked_fill", [scores], [(scores.dims, scores.dtype)], extra_saved=[(scores.dims, "bool")])[0]


def _ernie(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits_in_fp32(t, moe, x)
    scores = t.map("softmax", logits, saves="output")
    index = t.constant("topk indices", (*x.dims[:-1], t.dim("k", moe.top_k)), "int64")
    weights = _gather(t, scores, index)
    total = t.map("clamp", t.apply("sum", [weights], [((*weights.dims[:-1], "1"), "fp32")])[0])
    (weights,) = t.apply(
        "div",
        [weights, total],
        [(weights.dims, "fp32")],
        saves=[weights, total],
        raw_gradients=[None, (weights.dims, "fp32")],
    )
    return logits, t.to(weights, x.dtype), index


def _minimax(t: Operations, moe: Moe, x: Tensor) -> Routing:
    logits = _logits(t, moe, x)
    scores = t.map("sigmoid", t.to(logits, "fp32"), saves="output")
    index = t.constant("topk indices", (*x.dims[:-1], t.dim("k", moe.top_k)), "int64")
    return logits, _sum_to_one(t, _gather(t, scores, index)), index


_ROUTERS: dict[str, Callable[[Operations, Moe, Tensor], Routing]] = {
    "mixtral": _mixtral,
    "qwen": _qwen,
    "granite": _granite,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "ernie": _ernie,
    "minimax": _minimax,
}


# ---- experts ------------------------------------------------------------------------------------------------------


def _experts(t: Operations, moe: Moe, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """integrations/moe.py, grouped_mm_experts_forward: sort, gather, two grouped products, weigh, sort back, add up.

    Saved for each of the B*S*k gathered rows (bf16): the gathered token, 2H; gate and up, 4F; act(gate), 2F (and
    act(gate) * up, 2F); the expert's answer, 2H; and the int64 indices of sorting and sorting back.
    """
    t.module = moe.experts_name
    rows = (*x.dims[:-1], index.dims[-1])
    chosen = t.constant("sorted experts", rows, "int64")
    order = t.constant("sort", rows, "int64")
    gathered = _take(t, x, (*rows, x.dims[-1]))
    (weights,) = t.apply("index", [weights], [(weights.dims, weights.dtype)], saves=[order])
    counted = t.constant("experts as int32", rows, "int32")
    tokens = t.constant("histc", (t.dim("X", moe.experts),), "int32")
    offsets = t.constant("cumsum", tokens.dims, "int32")
    width, names = moe.width, [f"{moe.experts_name}.{name}" for name in moe.expert_names]
    wide = t.dim("2F", 2 * width) if moe.gated else t.dim("F", width)
    bias = _bias(t, moe, names[0], wide, rows, chosen)
    result = _grouped(t, moe, names[0], gathered, wide, offsets, bias)
    result = _gate(t, moe, result) if moe.gated else activate(t, moe.activation, result)
    bias = _bias(t, moe, names[-1], x.dims[-1], rows, chosen)
    result = _grouped(t, moe, names[-1], result, x.dims[-1], offsets, bias)
    t.module = moe.experts_name
    factors = t.view(weights, (*rows, "1"))
    weighted = t.mul(result, factors)
    back = t.constant("inverse of sort", rows, "int64")
    arange = t.constant("arange", rows, "int64")
    del arange
    (weighted,) = t.apply("index", [weighted], [(weighted.dims, weighted.dtype)], saves=[back])
    (total,) = t.apply("sum", [weighted], [(x.dims, weighted.dtype)])
    del counted, tokens
    return t.to(total, x.dtype)


def _take(t: Operations, x: Tensor, dims: Dims) -> Tensor:
    """x[order // k]: keeps the int64 row numbers; the gradient is added into zeros of x's size."""
    return t.apply("index", [x], [(dims, x.dtype)], extra_saved=[(dims[:-1], "int64")])[0]


def _bias(t: Operations, moe: Moe, name: str, wide: str, rows: Dims, chosen: Tensor) -> Tensor | None:
    """The experts' biases, gathered for every row."""
    if not moe.expert_bias:
        return None
    bias = t.weight(f"{name}_bias", (t.dim("X", moe.experts), wide))
    return t.apply("index", [bias], [((*rows, wide), bias.dtype)], saves=[chosen])[0]


def _grouped(t: Operations, moe: Moe, name: str, x: Tensor, wide: str, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """torch's grouped_mm of rows sorted by expert with the stacked weights; it runs in the weights' format."""
    t.module = name
    weight = t.weight(name, (t.dim("X", moe.experts), wide, x.dims[-1]))
    x = t.to(x, weight.dtype)
    saves = [x if weight.trainable else None, offsets]
    (result,) = t.apply("grouped_mm", [weight, x], [((*x.dims[:-1], wide), x.dtype)], saves=saves)
    return result if bias is None else t.add_(result, bias)


def _gate(t: Operations, moe: Moe, both: Tensor) -> Tensor:
    """act(gate) * up of the fused product."""
    half = (*both.dims[:-1], t.dim("F", moe.width))
    if moe.activation == "gpt_oss_swiglu":
        return _clamped_gate(t, both, half)
    gate, up = t.split(both, [half, half])
    return t.mul(activate(t, moe.activation, gate), up)


def _clamped_gate(t: Operations, both: Tensor, half: Dims) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped first, gate and up interleaved (GptOssExperts)."""
    gate, up = t.slices(both, [half, half])
    gate = _clamp(t, gate, 1)
    up = _clamp(t, up, 3)
    glu = t.mul(gate, t.map("sigmoid", t.scale(gate), saves="output"))
    return t.mul(t.scale(up, "add scalar"), glu)


def _clamp(t: Operations, x: Tensor, masks: int) -> Tensor:
    """Keeps its input; the gradient needs one bool mask for each bound, and their conjunction."""
    return t.apply("clamp", [x], [(x.dims, x.dtype)], saves=[x], backward_scratch=[(x.dims, "bool")] * masks)[0]

"""The tape against hand counts: what lives when, in a chain small enough to add up on paper."""

from __future__ import annotations

import numpy as np
import pytest

from planner.ledger.operations import Operations
from planner.ledger.tape import Tape, Tensor, allocated_bytes

KIB = 1024


def tape(**sizes: int) -> Operations:
    return Operations(sizes={"1": 1, "B": 4, "S": 64, "H": 128, "F": 512, **sizes}, weight_dtype=lambda _: "bf16")


def level(t: Tape) -> int:
    """Bytes alive after everything recorded so far."""
    return sum((1 if event > 0 else -1) * t.rows[abs(event) - 1].size for event in t.events)


def highest(t: Tape) -> int:
    alive = best = 0
    for event in t.events:
        alive += (1 if event > 0 else -1) * t.rows[abs(event) - 1].size
        best = max(best, alive)
    return best


def leaf(t: Operations, *dims: str) -> Tensor:
    x = t.constant("x", dims, "bf16")
    x.requires_grad = True
    return x


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 512), (512, 512), (513, 1024), (10**9 + 1, 10**9 + 512)])
def test_requests_are_rounded_to_512_bytes(size: int, expected: int) -> None:
    assert allocated_bytes(size) == expected


def test_rounding_takes_arrays() -> None:
    assert allocated_bytes(np.array([1, 512, 513])).tolist() == [512, 512, 1024]


def test_a_linear_saves_its_input_only_if_its_weight_trains() -> None:
    for trains, saved in ((True, 4 * 64 * 128 * 2), (False, 0)):
        t = tape()
        t.trainable = lambda _, trains=trains: trains
        t.begin("forward", 0)
        x = leaf(t, "B", "S", "H")
        before = level(t)
        y = t.linear("up", x, "F")
        del x
        kept = level(t) - t.rows[y.storage.index - 1].size
        assert kept == saved, f"{before=}"


def test_two_linears_backward_adds_up_by_hand() -> None:
    """x (64 KiB) -> up (256 KiB) -> down (64 KiB); weights' gradients 128 KiB each.

    Backward of down: its incoming gradient 64, the saved up output 256, dW 128, dx 256, beside x 64 = 768 KiB.
    Backward of up: incoming 256, saved x 64, dW 128, dx 64, beside down's dW 128 = 640 KiB.
    """
    t = tape()
    t.begin("forward", 0)
    x = leaf(t, "B", "S", "H")
    y = t.linear("down", t.linear("up", x, "F"), "H")
    del x
    assert level(t) == (64 + 256 + 64) * KIB
    y.node.grads[0] = t.allocate("gradient", y.dims, y.dtype)  # type: ignore[union-attr]
    del y
    t.run_backward()
    assert highest(t) == 768 * KIB
    assert level(t) == 256 * KIB
    assert set(t.gradients) == {"up.weight", "down.weight"}


def test_nothing_is_recorded_without_gradients() -> None:
    t = tape()
    t.enabled = False
    x = leaf(t, "B", "S", "H")
    y = t.map("silu", t.linear("up", x, "F"))
    assert not t.nodes
    assert not y.requires_grad


def test_accumulated_gradients_are_freed_as_soon_as_they_are_added() -> None:
    t = tape()
    t.accumulate = True
    t.begin("forward", 0)
    x = leaf(t, "B", "S", "H")
    y = t.linear("up", x, "F")
    del x
    t.backward(y)
    del y
    assert level(t) == 0


def test_a_tied_table_sums_its_two_gradients_out_of_place() -> None:
    t = tape(V=1000)
    table = t.weight("table", ("V", "H"))
    t.begin("forward", 0)
    (x,) = t.apply("embedding", [table], [(("B", "S", "H"), "bf16")])
    y = t.product(x, table, ("B", "S", "V"))
    del x
    t.backward(y)
    del y
    one = t.bytes_of(("V", "H"), "bf16")
    assert level(t) == one
    assert highest(t) >= 3 * one


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_keeps_its_input_alone(reentrant: bool) -> None:
    t = tape()
    t.reentrant = reentrant
    t.begin("forward", 0)
    flow = [leaf(t, "B", "S", "H")]
    flow.append(t.checkpoint(lambda x: t.linear("down", t.map("silu", t.linear("up", x, "F")), "H"), flow[0]))
    flow.pop(0)
    assert level(t) == 2 * 64 * KIB
    t.backward(flow.pop())
    assert set(t.gradients) == {"up.weight", "down.weight"}


def test_sizes_may_be_arrays() -> None:
    """One record answers for a grid: every column equals the record made for that size alone."""
    sizes = [32, 64, 100]
    grid = tape(S=np.array(sizes))  # type: ignore[arg-type]
    for t in (grid, *(tape(S=size) for size in sizes)):
        t.begin("forward", 0)
        x = leaf(t, "B", "S", "H")
        y = t.linear("down", t.map("silu", t.linear("up", x, "F")), "H")
        del x
        t.backward(y)
        del y
        if t is not grid:
            assert highest(t) in np.broadcast_to(_running(grid).max(axis=0), (3,)).tolist()


def _running(t: Tape) -> np.ndarray:
    rows = np.stack(np.broadcast_arrays(*[np.asarray(row.size) for row in t.rows]))
    events = np.array(t.events)
    return np.cumsum(rows[np.abs(events) - 1] * np.sign(events)[:, None], axis=0)

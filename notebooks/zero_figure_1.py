# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ZeRO's Figure 1 and Table 1, from the planner's own functions
#
# Claim: the training states that the planner puts on a rank are those of *ZeRO: Memory Optimizations Toward Training
# Trillion Parameter Models* ([arXiv:1910.02054](https://arxiv.org/abs/1910.02054)), Figure 1 and Table 1.
#
# The paper counts what mixed-precision Adam keeps: 2 bytes of weights and 2 of gradients for each parameter, and
# $K = 12$ bytes of fp32 master weights and moments. With $\Psi$ parameters on $N$ ranks:
#
# | | one rank holds |
# | --- | --- |
# | baseline | $(2 + 2 + K)\,\Psi$ |
# | $P_{os}$, stage 1 | $(2 + 2)\,\Psi + K\,\Psi / N$ |
# | $P_{os+g}$, stage 2 | $2\,\Psi + (2 + K)\,\Psi / N$ |
# | $P_{os+g+p}$, stage 3 | $(2 + 2 + K)\,\Psi / N$ |
#
# None of these formulas is written below. `zero_state_bytes` folds a list of tensors through the functions that answer
# a plan: the division over ranks, the optimizer's states, the allocator's rounding.

# %%
from planner.figures import zero_states
from planner.memory.zero import one_vector, zero_state_bytes
from planner.tables import states_frame

GB = 10**9  # the paper's unit
STAGES = {0: "baseline", 1: "P_os", 2: "P_os+g", 3: "P_os+g+p"}


def states(parameters: int, ranks: int, stage: int) -> dict[str, int]:
    return dict(zero_state_bytes(one_vector(parameters), ranks=ranks, stage=stage))


# %% [markdown]
# ## Figure 1: 7.5 billion parameters on 64 ranks

# %%
figure_1 = {name: states(7_500_000_000, 64, stage) for stage, name in STAGES.items()}
zero_states(figure_1, title="States of one rank: 7.5B parameters, 64 ranks").show(renderer="plotly_mimetype")

# %%
states_frame(figure_1) / GB

# %% [markdown]
# ## Table 1: three sizes of model on 1, 4 and 16 ranks, in GB

# %%
import pandas

SIZES = {"7.5B": 7_500_000_000, "128B": 128_000_000_000, "1T": 1_000_000_000_000}
table_1 = pandas.DataFrame(
    {
        (size, STAGES[stage]): {
            ranks: sum(states(parameters, ranks, stage).values()) / GB for ranks in (1, 4, 16)
        }
        for size, parameters in SIZES.items()
        for stage in (1, 2, 3)
    }
).rename_axis("ranks")
table_1.round(2)

# %% [markdown]
# ## How far off are we?
#
# Against the numbers as the paper prints them. Half a unit of the last printed digit is what rounding may hide; one
# allocation is rounded up to 2 MiB, as PyTorch's allocator hands large blocks out.

# %%
printed_figure_1 = {"baseline": "120", "P_os": "31.4", "P_os+g": "16.6", "P_os+g+p": "1.88"}
printed_table_1 = {
    "7.5B": {1: ("120", "120", "120"), 4: ("52.5", "41.3", "30"), 16: ("35.6", "21.6", "7.5")},
    "128B": {1: ("2048", "2048", "2048"), 4: ("896", "704", "512"), 16: ("608", "368", "128")},
    "1T": {1: ("16000",) * 3, 4: ("7000", "5500", "4000"), 16: ("4750", "2875", "1000")},
}

pairs = [(sum(figure_1[name].values()) / GB, text) for name, text in printed_figure_1.items()]
for size, rows in printed_table_1.items():
    for ranks, texts in rows.items():
        for stage, text in zip((1, 2, 3), texts, strict=True):
            pairs.append((table_1.loc[ranks, (size, STAGES[stage])], text))

rounding = 5 * 2 * 2**20 / GB
for ours, text in pairs:
    half_a_digit = 0.5 * 10 ** -len(text.partition(".")[2])
    assert abs(ours - float(text)) <= half_a_digit + rounding, (ours, text)

ours, text = max(pairs, key=lambda pair: abs(pair[0] / float(pair[1]) - 1))
print(f"{len(pairs)} published numbers, all equal to the last printed digit.")
print(f"The furthest is {ours:.3f} GB where the paper prints {text}: {abs(ours / float(text) - 1):.2%} off,")
print("which is within half a unit of the digit that the paper rounds to.")

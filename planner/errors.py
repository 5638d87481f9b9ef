"""Every exception the planner raises on purpose.

    PlannerError                 a request that cannot be answered; one sentence, for a person
    |-- PlanError                a plan document is wrong: type, range, contradiction
    |   `-- UnknownField         a field or a value that is not known; names the nearest one
    |-- UnknownName              no model, GPU, node or provider of that name; names the nearest one
    |-- ModelConfigError         a config.json whose keys or values could not be understood
    |-- ProfileError             a hardware profile or price list that breaks its own rules
    |-- NotCovered               the request is clear, but the model of the world has no rows for it yet
    `-- SourceUnavailable        a file, cache entry or network resource could not be read

"Does not fit" is no exception: it is an answer (see `planner.verdict`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ModelConfigError",
    "NotCovered",
    "PlanError",
    "PlannerError",
    "ProfileError",
    "SourceUnavailable",
    "UnknownField",
    "UnknownName",
    "nearest",
]


class PlannerError(ValueError):
    """A request that cannot be answered, said in one sentence (exit code 2 on the command line)."""


class PlanError(PlannerError):
    """A plan document holds a wrong type, a value out of range, or two fields that contradict each other."""


class UnknownField(PlanError):
    """A plan names a field, or gives an enumerated field a value, that does not exist."""


class UnknownName(PlannerError):
    """No model, accelerator, node or provider goes by the given name."""


class ModelConfigError(PlannerError):
    """A model configuration has keys or values that could not be understood."""


class ProfileError(PlannerError):
    """A hardware profile or price list breaks the rules of its own format."""


class NotCovered(PlannerError):
    """The request is well formed, but nothing in the ledger describes it."""


class SourceUnavailable(PlannerError):
    """A file, a cache entry or a network resource could not be read."""


def nearest(given: str, accepted: Iterable[str], *, shown: int = 8) -> str:
    """The tail of an error sentence: the nearest accepted name, or the accepted names when none is near.

    >>> nearest("adamv", ["adamw", "sgd"])
    'did you mean "adamw"?'
    >>> nearest("zzz", ["adamw", "sgd"])
    'accepted: adamw, sgd.'
    """
    names = sorted(set(accepted))
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(given.casefold()[:200], by_fold, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{by_fold[close[0]]}"?'
    listed = ", ".join(names[:shown])
    return f"accepted: {listed}{', ...' if len(names) > shown else '.'}"

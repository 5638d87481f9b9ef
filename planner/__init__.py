"""planner: what training, fine-tuning or serving a model needs in memory, time and money, and why.

Importing this package imports nothing else; names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import estimate as estimate
    from planner.api import load_hardware as load_hardware
    from planner.api import load_model as load_model
    from planner.errors import PlannerError as PlannerError
    from planner.measure.dry_run import trace as trace

__all__ = ["PlannerError", "estimate", "load_hardware", "load_model", "trace"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "PlannerError":
        from planner.errors import PlannerError

        return PlannerError
    if name == "trace":
        from planner.measure.dry_run import trace

        return trace
    if name in __all__:
        from planner import api

        return getattr(api, name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

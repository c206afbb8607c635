"""Exact moving averages of training checkpoints, offline and in constant memory.

The names below are the public interface; they are imported on first use, so that ``import
ema_cli`` and ``ema-avg --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ema_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from ema_cli.api import (
        average_run,
        diff,
        export,
        inspect,
        plan_run,
        rename,
        restore_map,
        watch,
    )
    from ema_cli.ema import ExponentialMovingAverage
    from ema_cli.errors import EmaError
    from ema_cli.verification.auditing import verify

__all__ = [
    "EmaError",
    "ExponentialMovingAverage",
    "average_run",
    "diff",
    "export",
    "inspect",
    "plan_run",
    "rename",
    "restore_map",
    "verify",
    "watch",
]

_HOMES = {
    "EmaError": "ema_cli.errors",
    "ExponentialMovingAverage": "ema_cli.ema",
    "verify": "ema_cli.verification.auditing",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "ema_cli.api")), name)
    raise AttributeError(f"module 'ema_cli' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

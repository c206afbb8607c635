"""The public functions: one per command, with the command's option names and defaults.

Imported on first use: a run needs nothing of what states and live runs take.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ema_cli.api.averaging import average_run, export, plan_run
    from ema_cli.api.checkpoints import diff, inspect, rename, restore_map
    from ema_cli.api.following import watch

__all__ = [
    "average_run",
    "diff",
    "export",
    "inspect",
    "plan_run",
    "rename",
    "restore_map",
    "watch",
]

_HOMES = {"average_run": "averaging", "export": "averaging", "plan_run": "averaging"}
_HOMES |= {"watch": "following"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = _HOMES.get(name, "checkpoints")
        return getattr(importlib.import_module(f"ema_cli.api.{home}"), name)
    raise AttributeError(f"module 'ema_cli.api' has no attribute '{name}'")

"""The public functions: one per command, with the command's option names and defaults."""

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

"""The terminal: tables, progress, plots and JSON lines. The only importer of rich."""

from ema_cli.views.out import SCHEMA, Out, silence
from ema_cli.views.screens import Screen
from ema_cli.views.tables import Cell

__all__ = ["SCHEMA", "Cell", "Out", "Screen", "silence"]

"""What was parsed so far in one search: the checkpoints of a run mostly share one index."""

from __future__ import annotations

from typing import Any

# Each format has its own keys, which begin with its name, and values.
Known = dict[tuple[Any, ...], Any]

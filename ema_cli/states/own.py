"""What `ExponentialMovingAverage` keeps of itself beside its shadows."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ema_cli.errors import DamagedState
from ema_cli.states import directory
from ema_cli.states.records import Fields, Manifest
from ema_cli.tensors import DTYPES, DType


class Own(NamedTuple):
    """The members of an `ExponentialMovingAverage` that a later one takes up.

    Attributes:
        updates: how many there were.
        local_steps: how many each averaged variable saw, the first apply included.
        shadow_names: what the shadow of each is called.
        known: dtypes of the tensors of the last checkpoint.
        trainable: its trainable variables.
    """

    updates: int
    local_steps: dict[str, int]
    shadow_names: dict[str, str]
    known: dict[str, DType]
    trainable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        known = {name: dtype.name for name, dtype in self.known.items()}
        return {**self._asdict(), "known": known, "trainable": list(self.trainable)}


def own_of(manifest: Manifest, path: str) -> Own:
    """Return what the class kept in a manifest of the state at `path`. Raises `DamagedState`."""
    where = os.path.join(path, directory.manifest_name(manifest.generation))
    take = Fields(manifest.own, where)
    local_steps, known = take.mapping("local_steps"), take.mapping("known")
    shadow_names, trainable = take.mapping("shadow_names"), take.any("trainable")
    good = (
        all(type(count) is int and count >= 0 for count in local_steps.values())
        and all(type(name) is str for name in shadow_names.values())
        and all(type(name) is str and name in DTYPES for name in known.values())
        and isinstance(trainable, list)
        and all(type(name) is str for name in trainable)
    )
    if not good:
        raise DamagedState(where, "expected what ExponentialMovingAverage keeps")
    return Own(
        take.count("updates"),
        local_steps,
        shadow_names,
        {name: DTYPES[dtype] for name, dtype in known.items()},
        tuple(trainable),
    )

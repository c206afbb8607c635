"""What an attack is: a file made by hand, and how each command must end on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

STEM = "model-step-300"


class Ends(NamedTuple):
    """Exit codes.

    Attributes:
        inspect: of ``inspect``.
        plan: of ``plan`` with an output of the input's own format.
        same: of ``run`` to the input's own format.
        other: of ``run`` to a safetensors file.
        dropped: of ``run --unknown drop`` to the input's own format.

    One below 0 is not tried.
    """

    inspect: int
    plan: int
    same: int
    other: int
    dropped: int = -1


# Headers are refused by every command; a payload that is not what its checksum says is met by those
# that read it; what a verbatim copy would pass on is refused to it alone.
REFUSED = Ends(12, 12, 12, 12)
LATE = Ends(0, 0, 12, 12)
READ = Ends(0, 0, 0, 0)
NOT_PASSED_ON = Ends(0, 12, 12, 0, 0)
LOOKED_AT = Ends(0, 0, -1, -1)  # sound and huge: not run

Values = Mapping[str, np.ndarray]


class Attack(NamedTuple):
    """One hostile file.

    Attributes:
        name: the attack, unique in its table.
        items: its numbers in the list of attacks.
        what: what it tries, in one line.
        build: writes it into a directory and returns its path.
        ends: how the commands end.
        words: what every refusal says besides the name of the file.
        values: what is averaged where it is read.
    """

    name: str
    items: tuple[int, ...]
    what: str
    build: Callable[[Path], Path]
    ends: Ends = REFUSED
    words: tuple[str, ...] = ()
    values: Values | None = None


def canary(folder: Path) -> Path:
    """Return the folder beside the attack's that nobody has any business in."""
    return folder.parent / "canary"


def writing(suffix: str, content: bytes) -> Callable[[Path], Path]:
    """Return a builder of a file with these bytes."""

    def build(folder: Path) -> Path:
        path = folder / f"{STEM}{suffix}"
        path.write_bytes(content)
        return path

    return build


def made(suffix: str, content: Callable[[Path], bytes]) -> Callable[[Path], Path]:
    """Return a builder of a file whose bytes depend on where it lies."""

    def build(folder: Path) -> Path:
        return writing(suffix, content(folder))(folder)

    return build

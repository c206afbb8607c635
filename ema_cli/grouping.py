"""Groups of tensors: the modules of a model, few enough to be looked at. Pure, names in and out."""

from __future__ import annotations

import re
from collections.abc import Sequence

# As many as the blocks of a large language model with what stands beside them.
MOST = 40
ALL = "all"
# Ends of names that tell nothing of a module.
_SUFFIXES = ("/.ATTRIBUTES/VARIABLE_VALUE",)
_SEPARATOR = re.compile("[./]")


def grouped(names: Sequence[str]) -> dict[str, str]:
    """Return the group of each tensor: the longest beginnings of names that are at most `MOST`.

    A beginning is made of whole parts, which ``.`` and ``/`` separate; the last part is the tensor
    itself, unless it is the only one: ``model.layers.0``, ``encoder/layer_3``, ``conv1``. Where
    even the first parts are too many, there is one group, ``all``.
    """
    ends = {name: _ends(name) for name in names}
    for depth in range(max(map(len, ends.values()), default=0), 0, -1):
        found = {name: name[: at[min(depth, len(at)) - 1]] for name, at in ends.items()}
        if len(set(found.values())) <= MOST:
            return found
    return dict.fromkeys(names, ALL)


def _ends(name: str) -> list[int]:
    """Return where the parts of a name end, but for the last of several."""
    bare = name
    for suffix in _SUFFIXES:
        bare = bare.removesuffix(suffix)
    ends = [match.start() for match in _SEPARATOR.finditer(bare) if match.start()]
    return ends or [len(bare)]

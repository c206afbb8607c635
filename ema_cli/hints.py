"""Near misses for the hints of errors: of names, of globs and of paths."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterable

from ema_cli.text import command, near_misses, shorten

OUTPUT = "say where the result goes: -o average.safetensors"
OTHER_NAME = "write to another name with -o"
STATE = "give a directory of its own: --state DIR"
PERMISSION = "ls -ld shows who may read it: copy it, or ask its owner"

# A directory may have millions of entries; whoever mistyped one of these waits for none of them.
_ENTRIES = 2000
_SHOWN = 3
# Characters of a name that a hint repeats; the rest of a longer one is a wildcard.
_LONG = 200
_WILD = re.compile(r"\[[^\]]*\]|[*?\[\]]+")
_PARTS = re.compile("[/._-]+")
# What stands for itself in none of the names a regular expression is tried on.
_SPECIAL = re.compile(r"\\.|\[[^\]]*\]|\{[^}]*\}|[.*+?^$()|\[\]{}\\]+")


def excluding(name: str) -> str:
    """Return the option that leaves a tensor out of the average, however long its name is."""
    return command("--exclude", name if len(name) <= _LONG else name[:_LONG] + "*")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return ``did you mean A or B``, or `otherwise` where nothing looks like `name`."""
    return meant(near_misses(name, known), otherwise)


def meant(close: Collection[str], otherwise: str = "") -> str:
    """Return ``did you mean A or B`` of the names in `close`, or `otherwise` of none."""
    return f"did you mean {' or '.join(shorten(name) for name in close)}" if close else otherwise


def near_glob(pattern: str, names: Collection[str], otherwise: str = "") -> str:
    """Return what looks like a glob that matches nothing, told by its literal parts."""
    return _near(_WILD.split(pattern), pattern, names, otherwise)


def near_expression(pattern: str, names: Collection[str], otherwise: str = "") -> str:
    """Return what looks like a regular expression that is found in none of `names`."""
    return _near(_SPECIAL.split(pattern), pattern, names, otherwise)


def _near(literals: list[str], pattern: str, names: Collection[str], otherwise: str) -> str:
    if literals == [pattern]:
        return did_you_mean(pattern, names, otherwise)
    longest = max(literals, key=len).strip("/._-").lower()
    if not longest:
        return otherwise
    some = list(itertools.islice(names, _ENTRIES))
    found = [name for name in some if longest in name.lower()]
    found = found or near_misses("".join(literals), some)
    if not found:
        parts = {name: _PARTS.split(name) for name in some}
        close = set(near_misses(longest, {part for found in parts.values() for part in found}, 0.7))
        found = [name for name, its in parts.items() if close.intersection(its)]
    shown = [shorten(name) for name in sorted(set(found))]
    more = f" and {len(shown) - _SHOWN:,} more" if len(shown) > _SHOWN else ""
    return f"near misses: {', '.join(shown[:_SHOWN])}{more}" if shown else otherwise


def near_path(path: str, otherwise: str = "") -> str:
    """Return which existing path is probably meant by one that does not exist."""
    above, wanted, rest = os.path.dirname(path.rstrip("/")), os.path.basename(path.rstrip("/")), ""
    while above and not os.path.isdir(above) and os.path.dirname(above) != above:
        rest = os.path.join(wanted, rest) if rest else wanted
        above, wanted = os.path.dirname(above), os.path.basename(above)
    try:
        with os.scandir(above or ".") as listing:
            entries = [entry.name for entry in itertools.islice(listing, _ENTRIES)]
    except OSError:
        return otherwise
    paths = [os.path.join(above, name) for name in near_misses(wanted, sorted(entries), 0.6)]
    whole = [os.path.join(path, rest) for path in paths if rest]
    found = [path for path in whole if os.path.exists(path)] or paths
    return meant([command(path) for path in found], otherwise)

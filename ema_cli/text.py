"""How names, numbers and sizes are written for people: safe, short, the same everywhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence


def printable(name: str) -> str:
    r"""Return `name` safe to show: control bytes, escapes and lone surrogates become ``\xNN``.

    Names come from files and are hostile until shown this way: a tensor name may hold terminal
    escape sequences or newlines.
    """
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in name
    )


def shorten(name: str, limit: int = 200) -> str:
    """Return a printable `name` of at most about `limit` characters, for error messages only."""
    if len(name) > limit:
        return f"{printable(name[: limit - 40])}… ({len(name)} characters)"
    return printable(name)


def with_article(title: str) -> str:
    """Return ``an HDF5 file``, ``a NumPy archive``."""
    return f"{'an' if title.startswith('HDF5') else 'a'} {title}"


def plural(count: int, noun: str) -> str:
    """Return ``"1 tensor"``, ``"2 tensors"``, ``"12,000 tensors"``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def checkpoints(steps: Sequence[int | None]) -> str:
    """Return ``"1 checkpoint, step 100"``, ``"20 checkpoints, steps 100 to 2,000"``."""
    told, known = plural(len(steps), "checkpoint"), [step for step in steps if step is not None]
    if len(known) < len(steps) or not known:
        return told
    if len(known) == 1:
        return f"{told}, step {known[0]:,}"
    return f"{told}, steps {known[0]:,} to {known[-1]:,}"


def size(n_bytes: int) -> str:
    """Return a size in binary units: ``"512 bytes"``, ``"1.5 MiB"``."""
    if n_bytes < 1024:
        return plural(n_bytes, "byte")
    value = float(n_bytes)
    units = ["KiB", "MiB", "GiB", "TiB", "PiB"]
    while True:
        value /= 1024
        unit = units.pop(0)
        if value < 1024 or not units:
            return f"{value:,.1f} {unit}"


def percent(share: float) -> str:
    """Return a share as a percentage with a precision that keeps small weights visible."""
    value = share * 100
    if value == 0 or abs(value) >= 0.1:
        return f"{value:.1f} %"
    return f"{value:.2g} %"


def command(*words: str) -> str:
    """Return a shell command line with every word quoted as the shell needs it."""
    return " ".join(shlex.quote(printable(word)) for word in words)


def near_misses(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """Return up to three of `known` that look like `name`, for did-you-mean hints."""
    import difflib  # only ever needed on the way to an error

    some = [other for other in list(known)[:5000] if len(other) <= 500]  # for its time's sake
    close = difflib.get_close_matches(name[:500], some, n=3, cutoff=cutoff)
    likeness = [difflib.SequenceMatcher(None, one, name).ratio() for one in close]
    return [one for one, like in zip(close, likeness, strict=True) if like > likeness[0] - 0.1]


def encodable(text: str) -> bool:
    """Whether `text` is UTF-8 when it is written, i.e. holds no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

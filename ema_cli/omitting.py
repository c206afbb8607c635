"""The command that makes a run without some of its checkpoints, for hints that can be pasted."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence

from ema_cli.invocation import run_words
from ema_cli.plan import Plan
from ema_cli.search import Choice
from ema_cli.tensors import Checkpoint
from ema_cli.text import command, printable

# As many paths are named one by one; more are told by patterns that the shell expands.
_NAMED = 12
_PATTERNS = 24
# What no pattern is made of.
_SPECIAL = re.compile(r"[^A-Za-z0-9._=-]")


def without(
    plan: Plan, dropped: Collection[int], *, again: bool = False, more: Sequence[str] = ()
) -> str:
    """Return the command for the run of a plan without some checkpoints, or an empty string.

    `again`: it is meant to replace the output of this very run; `more`: further options of it.
    """
    request, checkpoints = plan.request, plan.run.checkpoints
    kept = [k for k in range(len(checkpoints)) if k not in dropped]
    if not kept:
        return ""
    choice = _window(request.choice, plan.run.steps, kept)
    end = "".join(f" {word}" for word in (*more, *(["--overwrite"] if again else [])))
    if choice is not None:
        asked = dataclasses.replace(request, choice=choice)
        return command(*run_words(asked, request.averages)) + end
    left = [checkpoints[k] for k in kept]
    old = request.choice
    named = Choice(step_from=old.step_from, order=old.order, key=old.key)
    asked = dataclasses.replace(request, paths=(), choice=named)
    words = run_words(asked, request.averages)
    missing = [checkpoints[k] for k in dropped]
    many = len(left) > _NAMED and old.order == Choice().order
    patterns = _patterns(left, missing) if many else []
    paths = patterns or [shlex.quote(printable(one.path)) for one in left]
    return " ".join([*words[:2], *paths, command(*words[2:])]) + end


def _window(choice: Choice, steps: Sequence[int], kept: Sequence[int]) -> Choice | None:
    """Return the choice of steps that leaves out what lies at the ends, or None."""
    together = kept[-1] - kept[0] + 1 == len(kept)
    increasing = all(a < b for a, b in itertools.pairwise(steps))
    if not together or not increasing:
        return None
    start, stop, stride = choice.steps or (None, None, None)
    if kept[0] > 0 or choice.last is not None:
        start = steps[kept[0]]
    if kept[-1] < len(steps) - 1:
        stop = steps[kept[-1]]
    return dataclasses.replace(choice, steps=(start, stop, stride), last=None)


def _patterns(kept: Sequence[Checkpoint], dropped: Sequence[Checkpoint]) -> list[str]:
    """Return shell patterns for the files of one directory that are kept, or nothing."""
    files, others = [_file(one.path) for one in kept], [_file(one.path) for one in dropped]
    root = os.path.dirname(files[0])
    names = [os.path.basename(path) for path in files]
    if any(os.path.dirname(path) != root for path in files) or any(map(_SPECIAL.search, names)):
        return []
    suffix = os.path.splitext(names[0])[1]
    suffix = suffix if all(name.endswith(suffix) for name in names) else ""
    wanted = list(_complement(names, [os.path.basename(path) for path in others], 0, suffix))
    found = [os.path.join(glob.escape(root), word) for word in wanted]
    matched = sorted(path for word in found for path in glob.glob(word))
    if matched != sorted(files) or len(found) > _PATTERNS:
        return []
    return [os.path.join(shlex.quote(printable(root)), word) if root else word for word in wanted]


def _file(path: str) -> str:
    """Return what is there of a checkpoint: of a prefix its index."""
    return path if os.path.lexists(path) else f"{path}.index"


def _complement(kept: Sequence[str], dropped: Sequence[str], at: int, suffix: str) -> Iterator[str]:
    """Yield patterns for the kept names, which all begin with the same `at` characters."""
    if not dropped or len(kept) == 1:
        yield from kept if len(kept) == 1 else [f"{kept[0][:at]}*{suffix}"]
        return
    yield from (name for name in kept if len(name) == at)
    inside = {name[at] for name in dropped if len(name) > at}
    free = sorted({name[at] for name in kept if len(name) > at} - inside)
    plain = [one for one in free if one.isalnum()]
    if plain:
        one_of = plain[0] if len(plain) == 1 else f"[{''.join(plain)}]"
        yield f"{kept[0][:at]}{one_of}*{suffix}"
    for letter in [*sorted(inside), *(one for one in free if one not in plain)]:
        mine = [name for name in kept if name[at : at + 1] == letter]
        if mine:
            theirs = [name for name in dropped if name[at : at + 1] == letter]
            yield from _complement(mine, theirs, at + 1, suffix)

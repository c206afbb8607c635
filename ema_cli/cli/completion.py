"""Completion in bash, zsh and fish: what may follow, from the line and the headers of its files.

A word that is completed lands on the command line as it is, and names come from files that anybody
may have written. So only words are offered that mean nothing to any shell. Whatever goes wrong
on the way, nothing is offered, and nothing is said.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ema_cli.tensors import Checkpoint

Completer = Callable[[click.Context, click.Parameter, str], list[Any]]

# As `formats.FORMATS` has them, which takes long to import.
FORMATS = (
    *("safetensors", "safetensors-folder", "tensorflow", "torch", "torch-folder", "hdf5"),
    *("keras", "npz"),
)
_AVERAGES = (
    *("ema:", "half-life:", "mean", "lr:linear", "lr:cosine", "lr:1-sqrt", "power:", "weights:"),
)
_WINDOWED = ("ema:", "half-life:", "power:", "lr:", "mean")
_DECAYS = ("0.9", "0.99", "0.999", "0.9999")
# At most this many words are offered, and this many entries of a directory looked at.
MOST = 2000
_ENTRIES = 20_000
# Of a run, the newest checkpoint that can be read tells the names; so many are tried.
_TRIED = 4
_SAFE = re.compile(r"[\w./@%+][\w./@%+:,=-]*")
_LABEL = re.compile(r"[A-Za-z0-9._-]+=")


def is_safe(word: str) -> bool:
    """Whether a word means itself to every shell, and is no option."""
    return _SAFE.fullmatch(word) is not None


def _quietly(completer: Completer) -> Completer:
    """Return a completer that offers what is safe and begins rightly, and nothing on an error."""

    @functools.wraps(completer)
    def complete(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
        with contextlib.suppress(Exception):
            return completer(ctx, option, incomplete)
        return []

    return complete


def _offered(words: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    """Return the words that go on from `incomplete`; after those that end half-way no blank."""
    from click.shell_completion import CompletionItem

    fitting = (word for word in words if word.startswith(incomplete) and is_safe(word))
    chosen = itertools.islice(dict.fromkeys(fitting), MOST)
    return [
        CompletionItem(word, type="open" if word.endswith((":", "=", "/")) else "plain")
        for word in chosen
    ]


def _place(kind: str, incomplete: str) -> list[CompletionItem[str]]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]


# ---------------------------------------------------------------------------- words


def paths(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer files and directories."""
    return _place("file", incomplete)


def directories(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer directories."""
    return _place("dir", incomplete)


@_quietly
def format_names(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer the formats."""
    return _offered(FORMATS, incomplete)


@_quietly
def decays(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer decays people use, per checkpoint and per step."""
    return _offered(_decays(""), incomplete)


def _decays(before: str) -> list[str]:
    return [f"{before}{decay}{unit}" for unit in ("", "/step") for decay in _DECAYS]


@_quietly
def averages(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer the families of averages, after a label too, and then what each may go on with."""
    label = match[0] if (match := _LABEL.match(incomplete)) else ""
    spec = incomplete[len(label) :]
    words = list(_AVERAGES)
    if spec.startswith("ema:"):
        words = _decays("ema:")
    elif spec.startswith("weights:"):
        words = [f"weights:{path}" for path in _listed(spec.removeprefix("weights:"))]
    family, at, _ = spec.partition("@")
    going_on = any(word.startswith(spec) and word != spec for word in words)
    if at or (family[-1:].isalnum() and not going_on and family.startswith(_WINDOWED)):
        words = [f"{family}@last="] if at else [spec, f"{spec}@last="]
    return _offered((label + word for word in words), incomplete)


@_quietly
def provenances(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer the provenance files of a directory, and files where there is none."""
    found = [path for path in _listed(incomplete) if path.endswith(".ema.json")]
    return _offered(found, incomplete) or _place("file", incomplete)


def _listed(incomplete: str) -> Iterator[str]:
    """Yield the files and, with a slash, the directories that a path may go on to."""
    above, _, beginning = incomplete.rpartition("/")
    above = f"{above}/" if "/" in incomplete else ""
    with os.scandir(above or ".") as entries:
        for entry in itertools.islice(entries, _ENTRIES):
            if entry.name.startswith(beginning) and (beginning or entry.name[0] != "."):
                yield f"{above}{entry.name}" + ("/" if entry.is_dir() else "")


# ---------------------------------------------------------------------------- from headers


@_quietly
def tensors(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer the names of tensors in the newest checkpoint on the line."""
    index = _newest(ctx, ctx.params.get("key") or "").index
    return _offered((tensor.name for tensor in index.tensors), incomplete)


@_quietly
def keys(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer where a model may be inside the newest checkpoint on the line."""
    names = (tensor.name for tensor in _newest(ctx, "/").index.tensors)
    ends = ((re.search("[./]", name[len(incomplete) :]), name) for name in names)
    return _offered((name[: len(incomplete) + m.start()] for m, name in ends if m), incomplete)


@_quietly
def labels(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Offer the averages of the state on the line."""
    from ema_cli.states.summary import summarize

    state = summarize(os.path.expanduser(ctx.params["state"]))
    return _offered((average.label for average in state.averages), incomplete)


def _newest(ctx: click.Context, key: str) -> Checkpoint:
    """Return the newest readable checkpoint that the line names, or that lies in a run it names."""
    from ema_cli import formats
    from ema_cli.errors import EmaError

    named = next(ctx.params[name] for name in _ARGUMENTS if ctx.params.get(name))
    given = [named] if isinstance(named, str) else list(named)
    for path in itertools.islice(_newest_first([os.path.expanduser(p) for p in given]), _TRIED):
        with contextlib.suppress(EmaError, OSError):
            return formats.read(path, {}, key)
    raise LookupError(given)


_ARGUMENTS = ("runs", "run", "checkpoint", "path", "a")


def _newest_first(given: list[str]) -> Iterator[str]:
    """Yield checkpoints as their names tell the steps: of several, or in a directory."""
    from ema_cli.formats import tensorflow
    from ema_cli.runs import is_run
    from ema_cli.search import Choice
    from ema_cli.steps import step_from_name

    paths = given
    if len(given) == 1 and os.path.isdir(given[0]) and is_run(given[0], Choice()):
        with os.scandir(given[0]) as entries:
            names = [entry.name for entry in itertools.islice(entries, _ENTRIES)]
        stems = {tensorflow.stem_of(name) or name for name in names if name[0] != "."}
        stems = {stem for stem in stems if not stem.endswith(".ema.json")}
        paths = [os.path.join(given[0], stem) for stem in stems]
    steps = {path: step_from_name(os.path.basename(path.rstrip("/"))) for path in paths}
    yield from sorted(paths, key=lambda path: (-1 if (s := steps[path]) is None else s, path))[::-1]

"""Write docs/api.md from the signatures and docstrings of the public names.

    python docs/generate/api.py

`make docs` runs it, and tests/test_api_reference.py holds the page to what it makes.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ema_cli
from ema_cli import errors

PAGE = Path(__file__).resolve().parent.parent / "api.md"

# What the functions return and hand to callbacks, in the order of the page.
RESULTS = {
    "Plans": ("plan.Plan", "plan.Outcome", "plan.Costs", "schedules.Schedule", "averages.Average"),
    "Runs": (
        "running.RunResult",
        "distances.Distances",
        "outliers.Outlier",
        "continuing.StateResult",
        "continuing.ExportResult",
        "running.Written",
        "warnings.PlanWarning",
        "engine.Progress",
    ),
    "Live runs": (
        "live.reports.WatchResult",
        "live.reports.Looked",
        "live.reports.Applied",
        "live.reports.Published",
        "live.reports.Missed",
        "live.reports.Dropped",
    ),
    "Checkpoints": (
        "tensors.Checkpoint",
        "tensors.Index",
        "tensors.Tensor",
        "runs.Run",
        "search.PassedOver",
        "states.summary.StateSummary",
        "states.records.Row",
    ),
    "What the other functions return": (
        "restoring.RestoreMap",
        "restoring.Restored",
        "comparison.Comparison",
        "comparison.Difference",
        "renaming.Renamed",
        "verification.auditing.Verified",
    ),
}

HEAD = """\
# Python API

Made by `make docs` from the docstrings; edit those. Everything here is imported from `ema_cli`
itself; the classes further down are what the functions return. [errors.md](errors.md) lists the
errors, [json.md](json.md) the same data as the commands print it with `--json`.

Arguments have the names and the defaults of the commands' options (`--num-updates` is
`num_updates`), so `ema-avg COMMAND --help` and this page tell the same. Paths are `str` or
`os.PathLike`. Nothing is printed: what a command tells comes back in its result, or through
`on_event` and `on_report`.
"""

# How the signatures abbreviate.
TYPES = {
    "Select": '`Sequence[tuple["include" | "exclude", str]]`: globs of tensor names',
    "OnEvent": "`Callable[[Progress], None]`",
    "OnReport": "`Callable[[Looked | Applied | Published | Missed | Dropped], None]`",
    "Source": "`str | os.PathLike[str] | Mapping[str, ArrayLike]`: a checkpoint, or named arrays",
    "NumUpdates": "`int | str | Callable[[], int] | None`",
    "kernel.Array": "`numpy.ndarray`",
}

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):")
_ITEM = re.compile(r" {4}(\w[\w, *]*): (.*)")
_REFERENCE = re.compile(r"(?:arguments|Arguments) (?:\w+ ){0,7}are those of\s+`(\w+)`")


class Doc(NamedTuple):
    """A docstring in its parts; the sections hold (name, text) pairs, Returns a nameless one."""

    text: list[str]
    sections: dict[str, list[tuple[str, str]]]


def parsed(thing: object) -> Doc:
    """Return the docstring of `thing`, parsed; an empty one where it has none of its own."""
    text: list[str] = []
    sections: dict[str, list[tuple[str, str]]] = {}
    section = ""
    for line in inspect.cleandoc(getattr(thing, "__doc__", None) or "").splitlines():
        if match := _SECTION.fullmatch(line):
            section = match[1]
            sections[section] = []
        elif section and line.startswith("    "):
            _add(sections[section], line, section)
        elif line or not section:
            section = ""
            text.append(line)
    return Doc(text, sections)


def _add(items: list[tuple[str, str]], line: str, section: str) -> None:
    """Add a line of a section: a new item, or more of the last one."""
    match = None if section == "Returns" else _ITEM.fullmatch(line)
    if match:
        items.append((match[1], match[2]))
    elif items:
        name, text = items[-1]
        items[-1] = (name, f"{text} {line.strip()}")
    else:
        items.append(("", line.strip()))


def documented(function: Any) -> set[str]:
    """Return the parameters that a docstring tells of, also by naming another function."""
    doc = parsed(function)
    names = {name.strip("* ") for name, _ in doc.sections.get("Args", ())}
    other = _REFERENCE.search("\n".join(doc.text))
    return names | (documented(getattr(ema_cli, other[1])) if other else set())


def results() -> Iterator[tuple[str, type]]:
    """Yield the classes that the functions return, each with its heading."""
    for heading, names in RESULTS.items():
        for dotted in names:
            if (found := _find(dotted)) is not None:
                yield heading, found


def _find(dotted: str) -> type | None:
    """Return a class by its name in the package, or None where there is none of that name."""
    module, _, name = dotted.rpartition(".")
    if importlib.util.find_spec(f"ema_cli.{module}") is None:
        return None
    found: type | None = getattr(importlib.import_module(f"ema_cli.{module}"), name, None)
    return found


def public() -> dict[str, Any]:
    """Return the public members by name: functions, then classes."""
    members = {name: getattr(ema_cli, name) for name in ema_cli.__all__}
    return dict(sorted(members.items(), key=lambda item: (inspect.isclass(item[1]), item[0])))


def methods(cls: type) -> dict[str, Any]:
    """Return the public methods and properties that a class defines itself."""
    return {
        name: member
        for name, member in vars(cls).items()
        if not name.startswith("_") and not name.endswith("_json")
        if inspect.isfunction(member) or isinstance(member, property | classmethod)
    }


def fields(cls: type) -> dict[str, str]:
    """Return the fields of a dataclass or named tuple with their types, as they are written."""
    if dataclasses.is_dataclass(cls):
        return {f.name: str(f.type) for f in dataclasses.fields(cls) if not f.name.startswith("_")}
    named = getattr(cls, "_fields", ())
    return {name: str(cls.__annotations__[name]) for name in named}


# ---------------------------------------------------------------------------- the page


def signature(name: str, function: Any) -> str:
    """Return a call with every parameter on a line of its own, in a block."""
    made = inspect.signature(function)
    given = [p for p in made.parameters.values() if p.name != "self"]
    lines, starred = [], False
    for parameter in given:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            lines.append("    *,")
        lines.append(f"    {_parameter(parameter)},")
    returns = made.return_annotation
    back = "" if returns in (inspect.Signature.empty, None, "None") else f" -> {returns}"
    body = "\n".join(["(", *lines, ")"]) if lines else "()"
    return f"```python signature\n{name}{body}{back}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    note = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    return f"{parameter.name}{note}{default}"


def markdown(text: str) -> str:
    """Return the text of a docstring as Markdown: double backticks become single ones."""
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def _sections(doc: Doc) -> Iterator[str]:
    for title in ("Args", "Attributes", "Returns", "Raises"):
        if items := doc.sections.get(title):
            yield f"{ {'Args': 'Arguments'}.get(title, title) }:\n"
            lines = [f"- `{name}`: {text}" if name else f"- {text}" for name, text in items]
            yield markdown("\n".join(lines)) + "\n"


def described(thing: object) -> Iterator[str]:
    """Yield the parts of a docstring: its text, then its sections as lists."""
    doc = parsed(thing)
    yield markdown("\n".join(doc.text).rstrip()) + "\n"
    yield from _sections(doc)


def _class(name: str, cls: type, level: str) -> Iterator[str]:
    """Yield what there is to say about a class and its methods."""
    yield f"{level} {name}\n"
    if not fields(cls) and not issubclass(cls, Exception):
        yield signature(name, cls)
    yield from described(cls)
    for member, value in methods(cls).items():
        function = getattr(value, "__func__", value)
        if isinstance(function, property):
            yield f"`{member}` (property): {markdown(inspect.getdoc(function) or '')}\n"
        elif issubclass(cls, ema_cli.ExponentialMovingAverage):
            yield f"{level}# {name}.{member}\n"
            yield signature(member, function)
            yield from described(function)
        else:
            summary = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
            yield f"`{member}()`: {markdown(summary)}\n"


def _errors() -> Iterator[str]:
    """Yield the tree of errors with their exit codes."""
    yield "## Errors\n"
    yield "All are `ema_cli.EmaError`; the others are imported from `ema_cli.errors`.\n"
    found = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.EmaError)
    ]
    rows = ["| class | is a | exit code | |", "|---|---|---|---|"]
    for cls in found:
        base = "" if cls is errors.EmaError else f"`{cls.__bases__[0].__name__}`"
        said = markdown((inspect.getdoc(cls) or "").split("\n")[0])
        rows.append(f"| `{cls.__name__}` | {base} | {cls.exit_code} | {said} |")
    yield "\n".join(rows) + "\n"
    yield from _class("EmaError", errors.EmaError, "###")


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name, member in public().items():
        if inspect.isclass(member):
            if not issubclass(member, errors.EmaError):
                parts += _class(name, member, "##")
        else:
            parts += [f"## {name}\n", signature(name, member), *described(member)]
    before = ""
    parts.append("## Results\n")
    parts.append("Frozen data classes and named tuples.\n")
    parts.append("\n".join(f"- `{name}` is {text}" for name, text in TYPES.items()) + "\n")
    for heading, cls in results():
        if heading != before:
            parts.append(f"### {heading}\n")
            before = heading
        parts += _class(cls.__name__, cls, "####")
    parts += _errors()
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

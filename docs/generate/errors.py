"""Write docs/errors.md from the exception tree, the warnings' codes, and commands that are run.

    python docs/generate/errors.py

Every class of error and every code of a warning needs an example here; one without fails.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ema_cli
from ema_cli.errors import EXIT_CODES, EmaError

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from errors_examples import ERRORS, MEANINGS, WARNINGS, WITHOUT_EXAMPLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"

_EXIT = re.compile(r"\s+# exit (\d+)$")
# What differs from one machine, or moment, to the next.
_PASSING = (
    (re.compile(r"\d[\d.,]* (?:bytes|[KMGTP]iB) free"), "... free"),
    (re.compile(r" in \d+\.\d s"), " in ... s"),
    (re.compile(r"process \d+"), "process ..."),
    (re.compile(r"pid \d+"), "pid ..."),
)
_HEAD = """\
# Errors and warnings

<!-- Made by `make docs`: docs/generate/errors.py. Every command below is run by the tests. -->

An error is one line, *where: what: expected and found*, on stderr, then a blank line and a hint:
the command that would work, or what to do. Names out of files are shown with control characters
escaped, and cut when they are longer than 200 characters. With `--json` the last line of stdout is
the same as data, see [json.md](json.md). In Python every class below is raised under its name from
`ema_cli.errors`; `exit_code`, `message` and `hint` are its attributes. `EMA_AVG_DEBUG=1` shows the
traceback first.

## Exit codes

| code | meaning | classes |
|---|---|---|
"""
_WARNINGS = """\
## Warnings

A warning is a line on stderr that ends in its code, which is stable, and often a hint. The command
goes on; `--strict` makes an error of it, exit code 2, and `-q` is silent about it. With `--json` it
is a line of type `warning`.

"""


def classes() -> list[type[EmaError]]:
    """Return every class of the tree, those of other modules included, by exit code."""
    for module in pkgutil.walk_packages(ema_cli.__path__, "ema_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[EmaError]) -> Iterator[type[EmaError]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    found = [kind for kind in dict.fromkeys(below(EmaError)) if kind.__module__.startswith("ema_")]
    return sorted(found, key=lambda kind: codes_of(kind)[0])


def codes_of(kind: type[EmaError]) -> tuple[int, ...]:
    """Return the exit codes of a class; a signal decides that of `Stopped`."""
    code = inspect.getattr_static(kind, "exit_code")
    return (code,) if isinstance(code, int) else (130, 141, 143)


def warning_codes() -> set[str]:
    """Return the codes of all warnings that occur in the source."""
    found = set()
    for path in sorted((ROOT / "ema_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                called = node.func.id if isinstance(node.func, ast.Name) else called
                first = node.args[0]
                warns = called in ("PlanWarning", "Caution", "warning")
                if warns and isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    return found


def commands() -> list[str]:
    """Return every command of the page, in order."""
    blocks = [block for kind in classes() for block in _examples(ERRORS, kind.__name__)]
    blocks += [block for code in sorted(warning_codes()) for block in _examples(WARNINGS, code)]
    return [command for block in blocks for command in block]


def _examples(table: Mapping[str, Sequence[Sequence[str]]], name: str) -> Sequence[Sequence[str]]:
    if name not in table and name not in WITHOUT_EXAMPLE:
        raise SystemExit(f"{name}: expected an example in docs/generate/errors_examples.py")
    return table.get(name, ())


def run(commands: Sequence[str]) -> list[str]:
    """Return what each command prints; all are run in order in one directory."""
    bin_path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = {key: v for key, v in os.environ.items() if not key.startswith("EMA_AVG")}
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fixtures").symlink_to(ROOT / "fixtures")
        for command in commands:
            done = subprocess.run(  # noqa: S603  # the commands of this folder
                ["sh", "-c", _EXIT.sub("", command)],  # noqa: S607
                cwd=folder,
                env={**environment, "PATH": bin_path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
            code = _EXIT.search(command)
            if done.returncode != (int(code[1]) if code else 0):
                raise SystemExit(f"$ {command}\nexit code {done.returncode}\n{done.stdout}")
            outputs.append(_lasting(done.stdout))
    return outputs


def _lasting(output: str) -> str:
    for expression, instead in _PASSING:
        output = expression.sub(instead, output)
    return "".join(f"{line.rstrip()}\n" for line in output.rstrip().splitlines())


def page(outputs: Sequence[str]) -> str:
    """Return the page, with what its commands printed."""
    printed = iter(outputs)
    parts = [_HEAD, *(_row(code) for code in EXIT_CODES), "\n"]
    for kind in classes():
        codes = ", ".join(map(str, codes_of(kind)))
        parts.append(f"## {kind.__name__}\n\nExit code {codes}. {_meaning(kind)}\n\n")
        if "remedy" in vars(kind):
            parts.append(f"What to do, unless the error knows better: {kind.remedy}.\n\n")
        parts += _blocks(ERRORS, kind.__name__, printed)
    parts.append(_WARNINGS)
    for code in sorted(warning_codes()):
        parts.append(f"### {code}\n\n{MEANINGS[code]}\n\n")
        parts += _blocks(WARNINGS, code, printed)
    return "".join(parts).rstrip() + "\n"


def _row(code: int) -> str:
    names = [f"[{k.__name__}](#{k.__name__.lower()})" for k in classes() if code in codes_of(k)]
    return f"| {code} | {EXIT_CODES[code]} | {', '.join(names)} |\n"


def _meaning(kind: type[EmaError]) -> str:
    if kind.__name__ in MEANINGS:
        return MEANINGS[kind.__name__]
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _blocks(
    table: Mapping[str, Sequence[Sequence[str]]], name: str, printed: Iterator[str]
) -> Iterator[str]:
    if name in WITHOUT_EXAMPLE:
        yield f"No example: {WITHOUT_EXAMPLE[name]}.\n\n"
    for block in _examples(table, name):
        lines = "".join(f"$ {command}\n{next(printed)}" for command in block)
        yield f"```console\n{lines}```\n\n"


if __name__ == "__main__":
    PAGE.write_text(page(run(commands())), encoding="utf-8")

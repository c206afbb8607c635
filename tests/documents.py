"""The blocks of the documents that are executed, and how.

The convention, for the fenced blocks of README.md and docs/*.md:

- In a block marked ``console`` a line that starts with ``$ `` is a command for the shell. One that
  ends in ``  # exit 13`` must end with that exit code, every other one with 0. The lines up to the
  next command are what it prints into a pipe, stdout and stderr together: ``...`` inside a line
  stands for anything in that line, a line ``...`` for any number of lines.
- A block marked ``python`` is a script of its own. The lines in it that start with ``# > `` are
  what it prints to stdout, in the same manner.
- A block marked ``python torch``, ``python tensorflow`` or ``python keras`` needs that framework:
  interop/test_doc_snippets.py executes it. ``python signature`` is none to execute.

All blocks of a document are executed in order in one temporary directory, in which ``fixtures``
leads to the fixtures of the repository.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
FRAMEWORKS = ("torch", "tensorflow", "keras")

_FENCED = re.compile(r"^```([a-z]*)(?: ([a-z]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXIT = re.compile(r"\s+# exit (\d+)$")
_PRINTED = re.compile(r"^# ?>(?: (.*))?$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language, what else it is marked with, and what is in it."""

    language: str
    mark: str
    body: str


class Example(NamedTuple):
    """What is executed: a command or a script, its exit code, and what it must print."""

    command: str
    code: int
    output: str
    framework: str = ""
    script: bool = False

    @property
    def shown(self) -> str:
        """How the document shows it."""
        return self.command if self.script else f"$ {self.command}"


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a document."""
    return [Block(*found) for found in _FENCED.findall(text)]


def examples(text: str) -> list[Example]:
    """Return the commands and scripts of a document, in order."""
    found: list[Example] = []
    for block in blocks(text):
        if block.language == "console":
            found.extend(_commands(block.body))
        elif block.language == "python" and block.mark != "signature":
            output = "".join(f"{line}\n" for line in _PRINTED.findall(block.body))
            found.append(Example(block.body, 0, output, block.mark, script=True))
    return found


def _commands(block: str) -> Iterator[Example]:
    assert block.startswith("$ "), f"a console block starts with a command:\n{block}"
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        code = _EXIT.search(command)
        yield Example(_EXIT.sub("", command), int(code[1]) if code else 0, output)


def pattern(output: str) -> str:
    """Return the regular expression of an expected output."""
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    anything = r"(?:.*\n)*"
    return "".join(
        anything if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in lines
    )


def printed(output: str) -> str:
    """Return an output without blanks at the ends of lines and of the whole."""
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    return "".join(f"{line}\n" for line in lines)


def prepare(folder: Path) -> None:
    """Make a directory one in which the blocks of a document can be executed."""
    (folder / "fixtures").symlink_to(ROOT / "fixtures")


def execute(example: Example, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a reader would who has activated this environment, or a script."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    call = [sys.executable, "-"] if example.script else ["sh", "-c", example.command]
    return subprocess.run(
        call,
        cwd=folder,
        env={**os.environ, "PATH": path},
        input=example.command if example.script else "",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if example.script else subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )


def check(example: Example, folder: Path) -> None:
    """Execute an example and hold what it does to what the document shows."""
    done = execute(example, folder)
    everything = done.stdout + (done.stderr or "")
    assert done.returncode == example.code, f"{example.shown}\n{everything}"
    found = printed(done.stdout)
    fits = re.fullmatch(pattern(example.output), found)
    assert fits, f"{example.shown}\n{found}\nexpected\n\n{example.output}"

"""What the documents show is what happens: their commands are run, their links followed.

The convention, for every fenced block marked ``console`` in README.md and docs/*.md:

- a line that starts with ``$ `` is a command for the shell. All commands of a document run in
  order in one temporary directory, in which ``fixtures`` leads to the fixtures of the repository;
- a command that ends in ``  # exit 13`` must end with that exit code, every other one with 0;
- the lines up to the next command are what it prints into a pipe, stdout and stderr together.
  ``...`` inside a line stands for anything in that line, a line ``...`` for any number of lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ema_cli.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCUMENTS, *sorted(ROOT.glob("[!R]*.md")), ROOT / "fixtures" / "README.md"]

_FENCED = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXIT = re.compile(r"\s+# exit (\d+)$")
_COMMAND = re.compile(r"(?:`|^\s*(?:\$ )?)ema-avg ([a-z][a-z-]*)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class Example(NamedTuple):
    """A command, the exit code it must have, and what it must print."""

    command: str
    code: int
    output: str


def console_blocks(text: str) -> list[str]:
    """Return the contents of the fenced blocks marked ``console``."""
    return [body for language, body in _FENCED.findall(text) if language == "console"]


def examples(text: str) -> list[Example]:
    """Return the commands of a document, in order."""
    found: list[Example] = []
    for block in console_blocks(text):
        assert block.startswith("$ "), f"a console block starts with a command:\n{block}"
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            code = _EXIT.search(command)
            found.append(Example(_EXIT.sub("", command), int(code[1]) if code else 0, output))
    return found


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


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a reader would who has activated this environment."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )


# ---------------------------------------------------------------------------- the convention


@pytest.mark.parametrize(
    "expected, found, fits",
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n", "a\nb\n", False),
        ("took ... s\n", "took 0.3 s\n", True),
        ("took ... s\n", "took 0.3\n s\n", False),
        ("...\nb\n...\n", "b\n", True),
        ("a\n...\nc\n", "a\nx\ny\nc\n", True),
        ("a\n...\nc\n", "a\nx\ny\n", False),
        ("a (b) [c]*\n", "a (b) [c]*\n", True),
        ("", "a\n", False),
    ],
)
def test_expected_output_is_matched_line_by_line(expected: str, found: str, fits: bool) -> None:
    """Dots stand for anything in a line, alone for any lines; everything else is literal."""
    assert (re.fullmatch(pattern(expected), printed(found)) is not None) is fits


def test_commands_are_found_with_their_codes_and_outputs() -> None:
    """Only in blocks marked ``console``, in order."""
    text = "```console\n$ one  # exit 13\nout\n$ two\n```\n```sh\n$ no\n```\n```console\n$ 3\n```\n"
    assert examples(text) == [("one", 13, "out\n"), ("two", 0, ""), ("3", 0, "")]


# ---------------------------------------------------------------------------- the documents


def test_the_readme_shows_commands_at_work() -> None:
    """There is something to check: at least one console block that runs `ema-avg run`."""
    commands = [example.command for example in examples(README.read_text(encoding="utf-8"))]
    assert any(command.startswith("ema-avg run ") for command in commands)


@each_document
def test_every_command_does_what_the_document_shows(document: Path, tmp_path: Path) -> None:
    """Run in order: exit codes and outputs are those that are printed there."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    for command, code, output in examples(document.read_text(encoding="utf-8")):
        done = shell(command, tmp_path)
        assert done.returncode == code, f"$ {command}\n{done.stdout}"
        found = printed(done.stdout)
        assert re.fullmatch(pattern(output), found), f"$ {command}\n{found}\nexpected\n\n{output}"


@each_page
def test_every_command_mentioned_exists(page: Path) -> None:
    """`ema-avg WORD` in code is one of the commands `ema-avg --help` lists."""
    mentioned = set(_COMMAND.findall(page.read_text(encoding="utf-8")))
    assert mentioned <= set(cli.commands), mentioned - set(cli.commands)


@each_page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    """Links and images inside the repository point to what is there."""
    links = [a or b for a, b in _LINK.findall(page.read_text(encoding="utf-8"))]
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    missing = [file for file in files if file and not (page.parent / file).exists()]
    assert missing == []

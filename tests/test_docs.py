"""What the documents show is what happens: their blocks are executed, their links followed.

`documents.py` tells the convention. What needs a framework is executed by
interop/test_doc_snippets.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import (
    DOCUMENTS,
    FRAMEWORKS,
    README,
    ROOT,
    Example,
    check,
    examples,
    pattern,
    prepare,
    printed,
)
from documents import blocks as blocks_of

from ema_cli.cli import cli

PAGES = [*DOCUMENTS, *sorted(ROOT.glob("[!R]*.md")), ROOT / "fixtures" / "README.md"]

_COMMAND = re.compile(r"(?:`|^\s*(?:\$ )?)ema-avg ([a-z][a-z-]*)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$|<img [^>]*src=\"([^\"]+)\"", re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


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


def test_examples_are_found_with_their_codes_and_outputs() -> None:
    """Commands in blocks marked ``console``, scripts in those marked ``python``, in order."""
    text = (
        "```console\n$ one  # exit 13\nout\n$ two\n```\n```sh\n$ no\n```\n"
        "```python\nprint(1)\n# > 1\n```\n```python torch\nx\n```\n"
        "```python signature\nf()\n```\n```console\n$ 3\n```\n"
    )
    assert examples(text) == [
        Example("one", 13, "out\n"),
        Example("two", 0, ""),
        Example("print(1)\n# > 1\n", 0, "1\n", script=True),
        Example("x\n", 0, "", "torch", script=True),
        Example("3", 0, ""),
    ]


@pytest.mark.parametrize(
    "example",
    [
        Example("echo b", 0, "a\n"),
        Example("exit 1", 0, ""),
        Example("print(2)\n", 0, "1\n", script=True),
        Example("raise SystemExit(1)\n", 0, "", script=True),
    ],
)
def test_an_example_that_does_something_else_is_noticed(example: Example, tmp_path: Path) -> None:
    """Another output or exit code fails."""
    with pytest.raises(AssertionError):
        check(example, tmp_path)


# ---------------------------------------------------------------------------- the documents


def test_the_readme_shows_commands_at_work() -> None:
    """There is something to check: at least one console block that runs `ema-avg run`."""
    commands = [example.command for example in examples(README.read_text(encoding="utf-8"))]
    assert any(command.startswith("ema-avg run ") for command in commands)


@each_document
def test_every_block_does_what_the_document_shows(document: Path, tmp_path: Path) -> None:
    """Run in order: exit codes and outputs are those that are printed there."""
    prepare(tmp_path)
    for example in examples(document.read_text(encoding="utf-8")):
        if not example.framework:
            check(example, tmp_path)


@each_document
def test_every_mark_is_one_that_somebody_executes(document: Path) -> None:
    """A block that only looks executed would be worse than none."""
    for block in blocks_of(document.read_text(encoding="utf-8")):
        marks = {"python": ("", "signature", *FRAMEWORKS)}.get(block.language, ("",))
        assert block.mark in marks, f"{block.language} {block.mark}"


@each_page
def test_every_command_mentioned_exists(page: Path) -> None:
    """`ema-avg WORD` in code is one of the commands `ema-avg --help` lists."""
    mentioned = set(_COMMAND.findall(page.read_text(encoding="utf-8")))
    assert mentioned <= set(cli.commands), mentioned - set(cli.commands)


@each_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    """Links and images inside the repository point to what is there."""
    links = ["".join(found) for found in _LINK.findall(page.read_text(encoding="utf-8"))]
    inside = [link for link in links if not re.match(r"[a-z]+:", link)]
    missing = []
    for link in inside:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Return what links can lead to in a page: its headings, as GitHub spells them."""
    headings = _HEADING.findall(page.read_text(encoding="utf-8"))
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


def test_every_page_of_docs_is_in_the_table_of_contents() -> None:
    """docs/README.md links to each page beside it."""
    contents = ROOT / "docs" / "README.md"
    links = {"".join(found) for found in _LINK.findall(contents.read_text(encoding="utf-8"))}
    pages = {page.name for page in contents.parent.glob("*.md")} - {contents.name}
    assert pages <= links, pages - links


def test_every_module_has_its_place_in_the_architecture() -> None:
    """docs/architecture.md names each, those of a folder after the folder."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {word.removesuffix(".py") for word in re.findall(r"`([a-z0-9_]+(?:\.py)?)/?`", text)}
    modules = {path.stem for path in (ROOT / "ema_cli").rglob("*.py")} - {"__init__", "__main__"}
    commands = set(cli.commands)
    assert modules - named - commands == set()

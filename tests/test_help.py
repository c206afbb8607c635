"""The help: an example that runs first, options under headings, what exit codes mean last."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from helpers import cmd

from ema_cli.cli import cli, group
from ema_cli.cli.command import GROUPS, Command
from ema_cli.errors import EXIT_CODES

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = list(cli.commands)
WIDTHS = (40, 60, 80, 120, 200)
# In the order in which they can be tried: what one writes another reads.
ORDER = ("plan", "run", "inspect", "map", "diff", "rename", "watch", "export", "verify")


def examples_of(name: str) -> list[str]:
    """The command lines the help of a command shows."""
    command = cli.commands[name]
    assert isinstance(command, Command)
    return command.example.splitlines()


def help_of(name: str, width: int = 80) -> str:
    """The help of a command as it is shown on a terminal of some columns."""
    context = click.Context(
        cli.commands[name],
        parent=click.Context(cli, info_name="ema-avg"),
        info_name=name,
        terminal_width=width,
        max_content_width=width,
        help_option_names=["-h", "--help"],
    )
    return context.get_help()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a training run in it, as the examples have it."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "fixtures" / "digits" / "bf16", folder / "train_dir")
    return folder


def test_every_example_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on a run of the fixtures; an average differs from a checkpoint (13)."""
    monkeypatch.chdir(place)
    lines = [*group.EXAMPLES[:1], *(line for name in ORDER for line in examples_of(name))]
    assert set(ORDER) == set(cli.commands)
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "ema-avg"
        cmd(*words, code=13 if words[0] == "diff" else 0)
    assert (place / "average.safetensors").read_bytes() == (
        place / "again.safetensors"
    ).read_bytes()
    shutil.rmtree(place / "shadows")
    (place / "average.safetensors").unlink()
    cmd(*shlex.split(group.EXAMPLES[1])[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_of_the_command_and_stands_first(name: str) -> None:
    """Right below the usage, in one line at any width, so that it can be copied."""
    for line in examples_of(name):
        assert line.split()[:2] == ["ema-avg", name] or name == "inspect"
    for width in WIDTHS:
        text = help_of(name, width)
        assert all(f"\n  {line}\n" in text for line in examples_of(name))
        headings = re.findall(r"^([A-Z][A-Za-z ]+):", text, re.MULTILINE)
        assert headings[:2] == ["Usage", "Example"]
        assert headings[-1] == "EXIT STATUS"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_shows_every_option(name: str, width: int) -> None:
    """Wrapped where it has to be; a word that is longer than a line stays whole."""
    text = help_of(name, width)
    command = cli.commands[name]
    for option in command.params:
        if isinstance(option, click.Option):
            assert re.search(rf"^  .*{re.escape(option.opts[-1])}\b", text, re.MULTILINE)
    examples = set(examples_of(name))
    for line in text.splitlines():
        words = line.split()
        long = len(line) > max(width, 50)
        assert not long or line.strip() in examples or len(words) <= 3, line


@pytest.mark.parametrize("name", COMMANDS)
def test_options_stand_under_their_headings(name: str) -> None:
    """In one order; every command ends with what is common to all."""
    headings = re.findall(r"^([A-Z][A-Za-z ]+):$", help_of(name), re.MULTILINE)
    assert headings[0] == "Example"
    assert headings[1:-1] == [title for title in GROUPS if title in headings]
    assert headings[-2:] == ["Common", "EXIT STATUS"]


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_codes_are_explained(name: str) -> None:
    """Those the command can end with, in the words of the table."""
    section = help_of(name, 300).rpartition("EXIT STATUS:\n")[2]
    rows = dict(line.split(maxsplit=1) for line in section.splitlines())
    assert {"0", "1", "2", "12", "15", "130", "143"} <= set(rows)
    for code, meaning in rows.items():
        assert EXIT_CODES[int(code)] == meaning


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_one_meaning(name: str) -> None:
    """An option that several commands have is called and explained the same, or on purpose not."""
    own = {"output", "average", "include", "exclude", "names", "state", "dry_run", "non_finite"}
    own |= {"overwrite", "name", "glob", "plot"}
    mine = {o.name: o for o in cli.commands[name].params if isinstance(o, click.Option)}
    for other in cli.commands.values():
        for option in other.params:
            same = mine.get(option.name)
            if isinstance(option, click.Option) and same is not None and option.name not in own:
                assert (option.opts, option.help) == (same.opts, same.help), option.name


@pytest.mark.parametrize("name", COMMANDS)
def test_texts_are_sentences(name: str) -> None:
    """Each says something, with a capital letter first and a period last; none has two blanks."""
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            text = re.sub(r"\s*\[default: .*\]$", "", option.help or "")
            assert re.fullmatch(r"[A-Z<a-z(].*\.", text, re.DOTALL), (option.opts, text)
            assert "  " not in text
    short = cli.commands[name].short_help or ""
    assert re.fullmatch(r"[A-Z].{10,68}\.", short)


@pytest.mark.parametrize("words", [["-h"], ["--help"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_data_on_stdout(name: str, words: list[str]) -> None:
    """And nothing is needed for it, not even a required option."""
    outcome = cmd(name, *words)
    assert outcome.out.startswith(f"Usage: ema-avg {name} ")
    assert outcome.err == ""


def test_the_name_alone_shows_the_short_list() -> None:
    """What it is, every command once under what people want to do, how to learn more."""
    outcome = cmd()
    assert outcome.err == ""
    assert len(outcome.out.splitlines()) <= 32
    assert "Average the checkpoints a training run left behind" in outcome.out
    titles = re.findall(r"^([A-Z][a-z]+):$", outcome.out, re.MULTILINE)
    assert titles == ["Example", *group.SECTIONS]
    for name in COMMANDS:
        assert len(re.findall(rf"^  {name}  ", outcome.out, re.MULTILINE)) == 1
    assert "ema-avg COMMAND --help" in outcome.out
    assert "--version" not in outcome.out


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_its_help_tells_of_settings_and_completion_too(word: str) -> None:
    """With the lines that set completion up in each shell."""
    text = cmd(word).out
    for shell in ("bash", "zsh", "fish"):
        assert f"_EMA_AVG_COMPLETE={shell}_source ema-avg" in text
    assert "EMA_AVG_RUN_DECAY" in text
    assert "--version" in text
    assert set(group.SECTIONS) <= set(re.findall(r"^([A-Z][a-z]+):$", text, re.MULTILINE))


def test_every_command_has_a_section() -> None:
    """And no section a command that is not there."""
    names = [name for names in group.SECTIONS.values() for name in names]
    assert sorted(names) == sorted(COMMANDS)


def test_versions_are_those_of_a_bug_report() -> None:
    """Of the program, of Python and of every package that is used."""
    rows = dict(line.split(" ", 1) for line in cmd("--version").out.splitlines())
    assert list(rows)[:2] == ["ema-avg", "python"]
    packages = {"numpy", "ml_dtypes", "safetensors", "fastcrc", "h5py", "click", "rich"}
    assert set(rows) == {"ema-avg", "python", *packages}
    assert rows["numpy"] == np.__version__

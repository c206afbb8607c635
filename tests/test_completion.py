"""What the shells are offered, and that nothing that is offered can do harm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.core import Option
from helpers import raw_safetensors, write_checkpoint, write_run

import ema_cli
from ema_cli.cli import cli, completion, main
from ema_cli.cli.completion import is_safe
from ema_cli.formats import FORMATS

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SHELLS = ("bash", "zsh", "fish")


def asked(
    environment: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> tuple[int, str]:
    """What the program answers a shell, and its exit code; it never says anything on stderr."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        capfdbinary.readouterr()
        code = main([])
    out, err = capfdbinary.readouterr()
    assert err == b""
    return code, out.decode()


class Shell:
    """One of the shells, as its script talks to the program."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], name: str
    ) -> None:
        self.name = name
        self._fixtures = monkeypatch, capfdbinary

    def answers(self, line: str) -> list[tuple[str, str]]:
        """The (type, word) pairs that are offered at the end of a line."""
        words = line.split(" ")
        environment = {"_EMA_AVG_COMPLETE": f"{self.name}_complete", "COMP_WORDS": line}
        environment["COMP_CWORD"] = words[-1] if self.name == "fish" else str(len(words) - 1)
        _, out = asked(environment, *self._fixtures)
        lines = out.splitlines() if out.strip() else []
        if self.name == "zsh":
            assert len(lines) % 3 == 0
            assert all(lines)
            return list(zip(lines[::3], lines[1::3], strict=True))
        pairs = [text.partition("\t")[0].partition(",") for text in lines if text]
        return [(kind, word) for kind, _, word in pairs]

    def words(self, line: str) -> list[str]:
        """The words that are offered at the end of a line."""
        return [word for kind, word in self.answers(line) if kind in ("plain", "open")]


@pytest.fixture(params=SHELLS)
def shell(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Shell:
    """Each shell in turn."""
    return Shell(monkeypatch, capfdbinary, request.param)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints, of which the newest has one tensor more; here is where they are."""
    monkeypatch.chdir(tmp_path)
    values = [{"dense/kernel": np.float32([k]), "dense/bias:0": np.float32(k)} for k in (1, 2, 3)]
    values[2]["late"] = np.float32([1])
    return write_run(tmp_path / "run", values)


# ---------------------------------------------------------------------------- what is offered


def test_commands_and_options(shell: Shell) -> None:
    """As click knows them."""
    assert shell.words("ema-avg pl") == ["plan"]
    assert set(shell.words("ema-avg ")) == set(cli.commands)
    assert shell.words("ema-avg run --keep") == ["--keep-variables"]
    assert shell.words("ema-avg run --like ") == ["tensorflow", "torch", "keras"]
    assert shell.words("ema-avg run x --optimizer k") == ["keep"]


def test_formats(shell: Shell) -> None:
    """All of them, from a list that takes no time."""
    assert shell.words("ema-avg run --format ") == list(FORMATS)
    assert shell.words("ema-avg export s --format=saf") == ["safetensors", "safetensors-folder"]


AVERAGES = [
    ("--decay 0.99", ["0.99", "0.999", "0.9999", "0.99/step", "0.999/step", "0.9999/step"]),
    ("--average e", ["ema:"]),
    ("--average lr:", ["lr:linear", "lr:cosine", "lr:1-sqrt"]),
    ("--average ema:0.999", ["ema:0.999", "ema:0.9999", "ema:0.999/step", "ema:0.9999/step"]),
    ("--average fast=ha", ["fast=half-life:"]),
    ("--average half-life:30", ["half-life:30", "half-life:30@last="]),
    ("--average mean@", ["mean@last="]),
    ("--average mean", ["mean", "mean@last="]),
    ("--average ema:0.9999/", ["ema:0.9999/step"]),
    ("--average ema:0.5/step", ["ema:0.5/step", "ema:0.5/step@last="]),
    ("--average ema:0.9x/", []),
    ("--average=x=me", ["x=mean"]),
    ("--average nosuch", []),
    ("--average ema:0.5@last=3", []),
]


@pytest.mark.parametrize(("words", "expected"), AVERAGES, ids=[row[0] for row in AVERAGES])
def test_averages(shell: Shell, words: str, expected: list[str]) -> None:
    """Families, then what each goes on with, after labels too."""
    assert shell.words(f"ema-avg run x {words}") == expected


def test_what_is_not_finished_gets_no_blank(shell: Shell, run: Path) -> None:
    """Families wait for their numbers, directories for what is in them."""
    kinds = {word: kind for kind, word in shell.answers("ema-avg run --average ")}
    assert kinds["ema:"] == "open"
    assert kinds["mean"] == "plain"
    assert shell.answers("ema-avg run --average mean") == [
        ("plain", "mean"),
        ("open", "mean@last="),
    ]
    (run / "w.txt").write_text("1 1")
    assert ("open", "weights:run/") in shell.answers("ema-avg run --average weights:r")
    assert ("plain", "weights:run/w.txt") in shell.answers("ema-avg run --average weights:run/w")


def test_names_come_from_the_newest_checkpoint(shell: Shell, run: Path) -> None:
    """Of a run, of several checkpoints, of one; at the end of a line that lacks its last word."""
    every = ["dense/kernel", "dense/bias:0", "late"]
    assert sorted(shell.words("ema-avg run run --include ")) == sorted(every)
    assert shell.words("ema-avg plan run -o x --exclude l") == ["late"]
    assert shell.words("ema-avg map run/model-step-300.safetensors --include=la") == ["late"]
    assert shell.words("ema-avg watch run --include dense/k") == ["dense/kernel"]
    older = "run/model-step-100.safetensors run/model-step-200.safetensors"
    assert shell.words(f"ema-avg run {older} --include la") == []
    assert shell.words(f"ema-avg run {older} --include d") != []


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("digits/bf16", "hidden1.weight"),
        ("tensorflow/graph", "conv/batch_norm/beta"),
        ("tensorflow/keras", ""),
        ("torch/run", "conv1.weight"),
        ("torch/hf", ""),
        ("npz/run", ""),
    ],
)
def test_names_of_every_family(shell: Shell, family: str, name: str) -> None:
    """Files, folders, prefixes, pickles and archives."""
    found = shell.words(f"ema-avg run {FIXTURES / family} --include ")
    assert found
    assert name in [*found, ""]


def test_a_newest_file_that_is_damaged_gives_way(shell: Shell, run: Path) -> None:
    """To the next older one."""
    (run / "model-step-400.safetensors").write_bytes(b"\0" * 100)
    assert shell.words("ema-avg run run --include la") == ["late"]


def test_where_a_model_is_inside(shell: Shell) -> None:
    """The entries of a checkpoint that holds more, level by level."""
    gan = FIXTURES / "torch" / "gan"
    assert shell.words(f"ema-avg run {gan} --key net") == ["netG", "netD"]
    assert shell.words(f"ema-avg run {gan} --key optG/") == ["optG/state"]


def test_averages_of_a_state(shell: Shell, run: Path, tmp_path: Path) -> None:
    """By their labels."""
    (run / "model-step-300.safetensors").unlink()
    ema_cli.average_run(run, state=tmp_path / "s", average=["mean", "fast=ema:0.5"])
    assert shell.words("ema-avg export s --average ") == ["mean", "fast"]
    assert shell.words("ema-avg export run --average ") == []


def test_paths_are_left_to_the_shell(shell: Shell) -> None:
    """Which knows how to quote them."""
    for line in ("run ", "run r", "verify ", "run x -o ", "run x --config ", "rename x -o y"):
        assert [kind for kind, _ in shell.answers(f"ema-avg {line}")] == ["file"], line
    for line in ("run x --state ", "export s"):
        assert [kind for kind, _ in shell.answers(f"ema-avg {line}")] == ["dir"], line


def test_provenance_files_are_offered(shell: Shell, run: Path, tmp_path: Path) -> None:
    """Where there are any; else any file."""
    ema_cli.average_run(run, tmp_path / "o.safetensors", decay=0.5, last=1)
    assert shell.words("ema-avg run --from ") == ["o.safetensors.ema.json"]
    assert [kind for kind, _ in shell.answers("ema-avg run --from run/")] == ["file"]


# ---------------------------------------------------------------------------- hostile things


HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a b",
    "a\nb",
    "a\tb",
    "\x1b[31mred",
    "a'b",
    'a"b',
    "a\\b",
    "a&b",
    "a|b",
    "a>b",
    "~root",
    "a*",
    "a?",
    "[ab]",
    "{a,b}",
    "-option",
    "--json",
    "=ls",
    "#a",
    "!a",
    "a\u202eb",
    "",
]


def test_only_safe_words_are_offered(shell: Shell, tmp_path: Path) -> None:
    """What a shell would expand, run or take for an option is left out; other scripts stay."""
    tensors = {name: np.float32([1]) for name in [*HOSTILE, "plain", "größe/ядро:0", "a,b=c"]}
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    found = shell.words(f"ema-avg map {path} --include ")
    assert sorted(found) == sorted(["plain", "größe/ядро:0", "a,b=c"])


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_what_is_not_safe(name: str) -> None:
    """None of the hostile names means itself."""
    assert not is_safe(name)


def test_many_names_are_cut(shell: Shell, tmp_path: Path) -> None:
    """Nobody reads more."""
    tensors = {f"t{k}": np.float32(1) for k in range(completion.MOST + 500)}
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    assert len(shell.words(f"ema-avg map {path} --include ")) == completion.MOST


LINES = [
    "",
    "ema-avg",
    "ema-avg run --include",
    "ema-avg nosuch --x",
    "ema-avg run 'half quoted",
    'ema-avg run "',
    "ema-avg run '",
    "ema-avg run \\",
    "ema-avg run --decay",
    "ema-avg run --last x --include ",
    "ema-avg run --rule a",
    "ema-avg run --rule ",
    "ema-avg run --config nosuch.toml --include ",
    "ema-avg run nosuch --include ",
    "ema-avg run nosuch --key ",
    "ema-avg run damaged --include ",
    "ema-avg run fifo --include ",
    "ema-avg run damaged --key ",
    "ema-avg run --from nosuch/",
    "ema-avg run --average weights:nosuch/",
    "ema-avg export nosuch --average ",
    "ema-avg --json run --json=x ",
    "ema-avg run -- --include ",
    "ema-avg run --=",
    "ema-avg run -o",
    "\x1b \x00x".replace("\x00", ""),
]


@pytest.mark.parametrize("line", LINES)
def test_half_a_line_is_no_error(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Nothing is said, whatever is typed and whatever lies there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMA_AVG_RUN_RULE", "odd")
    monkeypatch.setenv("EMA_AVG_RUN_LAST", "x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "m-1.safetensors").write_bytes(raw_safetensors(b"{" * 100))
    os.mkfifo(tmp_path / "fifo")
    assert isinstance(shell.answers(line), list)


@pytest.mark.parametrize("instruction", ["bash", "nosuch_source", "nosuch_complete", "", "bash_x"])
def test_what_is_no_instruction(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], instruction: str
) -> None:
    """It is an error without words."""
    answer = asked({"_EMA_AVG_COMPLETE": instruction}, monkeypatch, capfdbinary)
    assert answer == (1, "")


# ---------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", SHELLS)
def test_scripts_are_written(
    name: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """One for each shell, which asks this program."""
    code, out = asked({"_EMA_AVG_COMPLETE": f"{name}_source"}, monkeypatch, capfdbinary)
    assert code == 0
    assert f"_EMA_AVG_COMPLETE={name}_complete" in out
    assert "%(" not in out


def bash(line: str, folder: Path, breaks: str | None = None) -> list[str]:
    """What the real bash puts in the place of the last word of a line."""
    script = 'eval "$(_EMA_AVG_COMPLETE=bash_source ema-avg)"\n'
    script += f"COMP_WORDBREAKS={shlex.quote(breaks)}\n" if breaks is not None else ""
    script += f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=(x) COMP_CWORD=0\n"
    script += '_ema_avg_completion ema-avg\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", script],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


IN_BASH = [
    ("ema-avg pl", ["plan"]),
    ("ema-avg run --average em", ["ema:"]),
    ("ema-avg run --average ema:0.9999", ["0.9999", "0.9999/step"]),
    ("ema-avg run --average x=ema:0.9999", ["0.9999", "0.9999/step"]),
    ("ema-avg run --average=ema:0.9999", ["0.9999", "0.9999/step"]),
    ('ema-avg run --average "ema:0.9999', ["ema:0.9999", "ema:0.9999/step"]),
    ("ema-avg run run --include=dense/b", ["dense/bias:0"]),
    ("ema-avg run run --include dense/bias:", ["0"]),
    ("ema-avg map run/model-step-300.safetensors --include l", ["late"]),
]


@pytest.mark.parametrize(("line", "expected"), IN_BASH, ids=[row[0] for row in IN_BASH])
def test_the_real_bash_replaces_its_own_part_of_a_word(
    run: Path, tmp_path: Path, line: str, expected: list[str]
) -> None:
    """Bash ends words at colons and equals signs, unless they are quoted."""
    assert run.is_dir()
    assert bash(line, tmp_path) == expected


def test_a_bash_that_keeps_colons_gets_whole_words(run: Path, tmp_path: Path) -> None:
    """As `COMP_WORDBREAKS` has it."""
    assert run.is_dir()
    assert bash("ema-avg run --average ema:0.9999", tmp_path, " \t\n") == [
        "ema:0.9999",
        "ema:0.9999/step",
    ]
    assert bash("ema-avg run run --include dense/bias:", tmp_path, " \t\n=") == ["dense/bias:0"]


def test_every_option_with_a_value_has_a_completion_or_none_by_choice() -> None:
    """What takes free text is listed here: numbers, patterns, sizes."""
    free = {
        *("glob", "last", "steps", "step_from", "name", "rule", "max_shard_size", "workers"),
        *("interval", "idle_timeout", "until_step", "every", "atol", "rtol", "sample"),
    }
    missing = set()
    for command in cli.commands.values():
        for option in command.params:
            plain = option.type.name in ("text", "integer", "integer range", "float")
            own = option._custom_shell_complete is not None
            if isinstance(option, Option) and not option.is_flag and plain and not own:
                missing.add(option.name)
    assert missing <= free

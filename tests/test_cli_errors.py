"""Errors have a code, one line and a hint; options come from flag, environment or file."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from helpers import cmd, write_run

from ema_cli import api, errors
from ema_cli.cli import cli, main
from ema_cli.errors import EXIT_CODES, EmaError

COMMANDS = sorted(cli.commands)
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EmaError)]
# 16 is reserved for durable states.
CONTRACT = {0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17, 130, 141, 143}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three small checkpoints."""
    return write_run(tmp_path / "run", [{"w": np.full(4, k, np.float32)} for k in (1, 2, 3)])


def child(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ema-avg in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ema_cli", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---------------------------------------------------------------------------- tracebacks


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nosuch"], 2),
        (["run", "RUN"], 2),
        (["plan", "RUN", "--decay", "nan"], 2),
        (["plan", "RUN/none"], 12),
        (["run", "RUN", "-o", "RUN/model-step-100.safetensors", "--overwrite"], 14),
        (["diff", "RUN/model-step-100.safetensors", "RUN/model-step-200.safetensors"], 13),
    ],
)
def test_no_traceback_without_being_asked(run: Path, words: list[str], code: int) -> None:
    """An error a user can make shows no traceback, in a real process too."""
    done = child(*(word.replace("RUN", str(run)) for word in words))
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_debugging_shows_the_traceback(run: Path) -> None:
    """``EMA_AVG_DEBUG=1`` shows where an error came from; 0 does not."""
    assert "Traceback" in child("plan", run / "none", EMA_AVG_DEBUG="1").stderr
    assert "Traceback" not in child("plan", run / "none", EMA_AVG_DEBUG="0").stderr


def test_our_own_mistakes_are_exit_1(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception nobody expected is an internal error with a hint, not a traceback."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("oops \x1b[31m")

    monkeypatch.setattr(api, "plan_run", broken)
    outcome = cmd("plan", run, "--json", code=1)
    assert "internal error: ZeroDivisionError: oops" in outcome.err
    assert "EMA_AVG_DEBUG=1" in outcome.err
    assert "\x1b" not in outcome.err
    assert json.loads(outcome.out)["code"] == 1


def test_debugging_shows_where_an_internal_error_came_from(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``EMA_AVG_DEBUG=1`` the traceback comes first, the exit code stays."""
    monkeypatch.setattr(api, "plan_run", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setenv("EMA_AVG_DEBUG", "1")
    assert main(["plan", str(run)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "internal error: ZeroDivisionError" in shown


# ---------------------------------------------------------------------------- codes


def test_the_table_of_exit_codes_is_complete() -> None:
    """Every code of the contract has a meaning, and every error class one of these codes."""
    assert set(EXIT_CODES) == CONTRACT
    assert {c.exit_code for c in CLASSES} <= set(EXIT_CODES)
    assert all(EXIT_CODES.values())


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind: type[EmaError]) -> None:
    """What a worker process raises arrives with the same text, hint and code."""
    error = kind("where/it was", "what went wrong")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    for name in ("message", "hint", "exit_code", "args"):
        assert getattr(back, name) == getattr(error, name)
    assert str(back) == str(error) == error.message != ""


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["plan"],
        ["run", "x", "-o"],
        ["plan", "x", "--init", "ones"],
        ["plan", "x", "--workers", "0"],
        ["plan", "x", "--last", "many"],
        ["diff", "a"],
        ["plan", "x", "--nosuch"],
        ["map", "a", "b"],
    ],
    ids=" ".join,
)
def test_usage_errors_point_to_the_help(words: list[str]) -> None:
    """A command line that makes no sense is exit 2, with a hint that runs."""
    hint = cmd(*words, code=2).err.split("hint: see ")[1]
    assert shlex.split(hint)[0] == "ema-avg"
    assert "Usage: ema-avg" in cmd(*shlex.split(hint)[1:]).out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["plan", "x", "--deacy", "0.9"], "--decay"),
        (["run", "x", "--averge", "mean"], "--average"),
        (["rn", "x"], "run"),
        (["inspct", "x"], "inspect"),
    ],
)
def test_did_you_mean(words: list[str], meant: str) -> None:
    """A mistyped option or command is answered with the one that was meant."""
    assert meant in cmd(*words, code=2).err


# ---------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    """Help has an example that parses, the exit codes with their meaning, and -h is the same."""
    text = cmd(name, "--help").out
    assert text == cmd(name, "-h").out
    example = re.search(r"Example:\n((?:  .*\n)+)", text)
    assert example is not None
    words = shlex.split(" ".join(example[1].split()))
    assert words[:2] == ["ema-avg", name]
    command = cli.commands[name]
    with click.Context(command, info_name=name) as context:
        command.make_parser(context).parse_args(words[2:])
    status = re.search(r"exit status:\n((?:  .*\n)+)", text, re.IGNORECASE)
    assert status is not None
    codes = [int(code) for code in re.findall(r"^  (\d+) ", status[1], re.MULTILINE)]
    assert codes == sorted(set(codes))
    assert {0, 2, 12} <= set(codes) <= CONTRACT


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    """No option without a word of help."""
    options = [p for p in cli.commands[name].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_bare_command_shows_the_groups() -> None:
    """``ema-avg`` alone shows what there is, in groups, and is no error."""
    outcome = cmd()
    assert outcome.err == ""
    headings = re.findall(r"^(\w+):$", outcome.out, re.MULTILINE)
    assert headings == ["Example", "Average", "Look", "Write", "Check"]
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", outcome.out, re.MULTILINE)


def test_version_tells_what_a_bug_report_needs() -> None:
    """``--version`` names ema-avg and every library that touches the numbers."""
    lines = dict(line.split(" ") for line in cmd("--version").out.splitlines())
    assert {"ema-avg", "python", "numpy", "ml_dtypes", "safetensors"} <= set(lines)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["plan"], []], ids=" ".join)
def test_help_loads_no_heavy_library(words: list[str]) -> None:
    """Help and usage errors come without numpy, rich, ml_dtypes, safetensors or h5py."""
    program = (
        "import sys\nfrom ema_cli.cli import main\nmain(sys.argv[1:])\n"
        "heavy = {'numpy', 'rich', 'ml_dtypes', 'safetensors', 'h5py', 'fastcrc', 'asyncio'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


# ---------------------------------------------------------------------------- configuration


def spec(*words: Any) -> str:
    """The average a plan ends up with."""
    return json.loads(cmd("plan", *words, "--json").out.splitlines()[-1])["averages"][0]["average"][
        "spec"
    ]


def test_flag_beats_environment_beats_file_beats_default(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--decay`` over ``EMA_AVG_PLAN_DECAY`` over ``[plan] decay`` over the default."""
    config = tmp_path / "ema.toml"
    config.write_text("[plan]\ndecay = 0.7\nnum-updates = 'none'\n[run]\ndecay = 0.4\n")
    assert spec(run) == "ema:0.999"
    assert spec(run, "--config", config) == "ema:0.7"
    monkeypatch.setenv("EMA_AVG_PLAN_DECAY", "0.6")
    assert spec(run, "--config", config) == "ema:0.6"
    assert spec(run, "--config", config, "--decay", "0.5") == "ema:0.5"


def test_each_command_has_its_own_table_and_variables(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``EMA_AVG_RUN_…`` is for ``run`` only; a plan takes the table ``[run]`` as a run does."""
    config = tmp_path / "ema.toml"
    config.write_text("[run]\naverage = ['mean']\nnames = 'variable'\nexclude = ['w*']\n")
    monkeypatch.setenv("EMA_AVG_RUN_INCLUDE", "w")
    out = tmp_path / "o.safetensors"
    cmd("run", run, "-o", out, "--exclude", "none*", "--include", "w", "--config", config, code=13)
    cmd("run", run, "-o", out, "--include", "w", "--config", config)
    kept = json.loads(Path(f"{out}.ema.json").read_bytes())
    assert kept["average"]["spec"] == "mean"
    assert kept["output"]["names"] == "variable"
    assert kept["averaged"] == ["w"]
    assert spec(run, "--include", "w", "--config", config) == "mean"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[plan]\ndeacy = 0.9\n", "decay"),
        ("decay = 0.9\n", "decay"),
        ("[paln]\ndecay = 0.9\n", "paln"),
        ("plan = 3\n", "plan"),
        ("[plan]\ninit = 'ones'\n", "init"),
        ("[plan]\nlast = 'x'\n", "last"),
        ("[plan\n", "ema.toml"),
        ("\udcff = 1", "ema.toml"),
    ],
)
def test_a_config_that_makes_no_sense_is_a_usage_error(
    run: Path, tmp_path: Path, text: str, said: str
) -> None:
    """Unknown keys and tables, wrong types, no TOML: exit 2, and the message says which."""
    config = tmp_path / "ema.toml"
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert said in cmd("plan", run, "--config", config, code=2).err


def test_a_config_that_is_not_there_is_a_usage_error(run: Path, tmp_path: Path) -> None:
    """A missing file or a directory as ``--config`` is exit 2."""
    cmd("plan", run, "--config", tmp_path / "none.toml", code=2)
    cmd("plan", run, "--config", tmp_path, code=2)


def test_json_can_be_asked_for_by_file_and_environment(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``json = true`` and ``EMA_AVG_PLAN_JSON=1`` mean ``--json``, for errors too."""
    config = tmp_path / "ema.toml"
    config.write_text("[plan]\njson = true\n")
    assert json.loads(cmd("plan", run, "--config", config).out)["type"] == "result"
    monkeypatch.setenv("EMA_AVG_PLAN_JSON", "1")
    assert json.loads(cmd("plan", run).out)["type"] == "result"
    assert json.loads(cmd("plan", run / "none", code=12).out)["type"] == "error"

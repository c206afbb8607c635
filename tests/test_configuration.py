"""Where an option has its value from: the line, the environment, a file, or its default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_run

from ema_cli.cli import cli
from ema_cli.cli.configuration import variables


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints of seven tensors."""
    values = [{name: np.float32([k]) for name in "abcdefg"} for k in (1, 2, 3, 4)]
    return write_run(tmp_path / "run", values)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where a test may write a configuration."""
    return tmp_path / "c.toml"


def told(run: Path, *words: Any) -> dict[str, Any]:
    """The first average that a plan tells of."""
    text = cmd("plan", run, "-q", "--json", *words).out
    found: dict[str, Any] = json.loads(text.splitlines()[-1])["averages"][0]
    return found


# ---------------------------------------------------------------------------- precedence


def level(document: dict[str, Any], *keys: str) -> Any:
    """A member of a member."""
    found: Any = document
    for key in keys:
        found = found[key]
    return found


CASES = [
    # option, (file, variable, words), what each level gives, where a plan tells it
    (
        "decay",
        ("0.5", "0.6", ["--decay", "0.7"]),
        ["ema:0.999", "ema:0.5", "ema:0.6", "ema:0.7"],
        ("average", "spec"),
    ),
    (
        "last",
        ("2", "3", ["--last", "1"]),
        [[100, 200, 300, 400], [300, 400], [200, 300, 400], [400]],
        ("steps",),
    ),
    (
        "include",
        ('["d*"]', "e* f*", ["--include", "g*"]),
        [[], [["include", "d*"]], [["include", "e*"], ["include", "f*"]], [["include", "g*"]]],
        ("request", "select"),
    ),
    (
        "rule",
        ('[["a", "x"], ["b", "y"]]', "a z", ["--rule", "a", "v"]),
        [[], [["a", "x"], ["b", "y"]], [["a", "z"]], [["a", "v"]]],
        ("request", "rule"),
    ),
    (
        "optimizer",
        ('"keep"', "drop", ["--optimizer", "auto"]),
        ["auto", "keep", "drop", "auto"],
        ("request", "optimizer"),
    ),
    (
        "keep-variables",
        ("true", "0", ["--keep-variables"]),
        [False, True, False, True],
        ("request", "keep_variables"),
    ),
    (
        "average",
        ('["mean"]', "lr:cosine", ["--average", "power:0.1"]),
        ["ema:0.999", "mean", "lr:cosine", "power:0.1"],
        ("average", "spec"),
    ),
    (
        "name",
        ('"one"', "two", ["--name", "three"]),
        ["ExponentialMovingAverage", "one", "two", "three"],
        ("request", "name"),
    ),
]


@pytest.mark.parametrize(
    ("option", "given", "expected", "where"), CASES, ids=[case[0] for case in CASES]
)
def test_the_line_then_the_environment_then_the_file_then_the_default(
    run: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    given: tuple[str, str, list[str]],
    expected: list[Any],
    where: tuple[str, ...],
) -> None:
    """All four levels, one upon the other."""

    def found(*words: str) -> Any:
        document = told(run, "--unknown", "keep", *words)
        document["steps"] = [row["step"] for row in document["inputs"]]
        return level(document, *where)

    in_file, in_environment, on_line = given
    answers = [found()]
    config.write_text(f"[run]\n{option} = {in_file}\n")
    answers.append(found("--config", str(config)))
    monkeypatch.setenv(f"EMA_AVG_RUN_{option.upper().replace('-', '_')}", in_environment)
    answers.append(found("--config", str(config)))
    answers.append(found("--config", str(config), *on_line))
    assert answers == expected


def test_plan_listens_to_what_run_is_told(
    run: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And first to what it is told itself."""
    monkeypatch.setenv("EMA_AVG_RUN_DECAY", "0.5")
    assert told(run)["average"]["spec"] == "ema:0.5"
    monkeypatch.setenv("EMA_AVG_PLAN_DECAY", "0.6")
    assert told(run)["average"]["spec"] == "ema:0.6"
    config.write_text("[run]\nlast = 2\noverwrite = true\n[plan]\nlast = 3\n")
    assert len(told(run, "--config", config)["inputs"]) == 3


def test_a_file_may_be_named_in_the_environment(
    run: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all commands, or for one."""
    config.write_text("[run]\nlast = 2\n")
    monkeypatch.setenv("EMA_AVG_CONFIG", str(config))
    assert len(told(run)["inputs"]) == 2
    other = tmp_path / "other.toml"
    other.write_text("[run]\nlast = 1\n")
    monkeypatch.setenv("EMA_AVG_RUN_CONFIG", str(other))
    assert len(told(run)["inputs"]) == 1
    monkeypatch.setenv("EMA_AVG_RUN_CONFIG", "nosuch.toml")
    assert "error: EMA_AVG_RUN_CONFIG nosuch.toml: cannot open" in cmd("plan", run, code=2).err


# ---------------------------------------------------------------------------- every option


def every_option() -> list[tuple[str, click.Option]]:
    """All options that may be set elsewhere, each with its command."""
    return [
        (name, option)
        for name, command in cli.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and option.allow_from_autoenv
    ]


def sample(option: click.Option) -> tuple[str, str, Any]:
    """A value as a file and a variable hold it, and what the command gets."""
    if isinstance(option.type, click.Choice):
        one: tuple[str, str, Any] = (f'"{option.type.choices[-1]}"',) * 2 + (
            option.type.choices[-1],
        )
        return one[0], str(one[2]), one[2]
    if option.is_flag:
        return "true", "yes", True
    if option.type.name.startswith("integer"):
        return "3", "3", 3
    if option.type.name == "float":
        return "0.5", "0.5", 0.5
    if option.nargs == 2:
        return '[["a", "b"], ["c", "d"]]', "a b c d", (("a", "b"), ("c", "d"))
    if option.multiple:
        return '["a", "b"]', "a b", ("a", "b")
    return '"text"', "text", "text"


@pytest.mark.parametrize(
    ("name", "option"), every_option(), ids=[f"{n}{o.opts[-1]}" for n, o in every_option()]
)
def test_every_option_can_be_set_elsewhere(
    config: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: click.Option
) -> None:
    """From a variable that is called as the option is, and from an entry of a file."""
    if option.name == "config":
        return
    in_file, in_environment, expected = sample(option)
    word = max(option.opts, key=len).removeprefix("--")
    assert option.name is not None
    got: list[dict[str, Any]] = []
    command = cli.commands[name]
    monkeypatch.setattr(command, "callback", lambda *_, **given: got.append(given))
    arguments = ["x"] * (2 if name == "diff" else 1)
    needed = {"watch": ("state",), "export": ("output",), "rename": ("output",)}.get(name, ())
    required = [part for one in needed if one != word for part in (f"--{one}", "x")]
    config.write_text(f"[{name}]\n{word} = {in_file}\n")
    cmd(name, *arguments, *required, "--config", config)
    monkeypatch.setenv(f"EMA_AVG_{name.upper()}_{word.upper().replace('-', '_')}", in_environment)
    cmd(name, *arguments, *required)
    assert [given[option.name] for given in got] == [expected, expected]


def test_variables_are_called_as_options_are() -> None:
    """Not as the program calls them inside."""
    command = cli.commands["map"]
    [program] = (p for p in command.params if p.name == "program")
    root = click.Context(cli, info_name="ema-avg", auto_envvar_prefix="EMA_AVG")
    context = click.Context(command, parent=root, info_name="map")
    assert variables(context, program) == ["EMA_AVG_MAP_FOR"]


def test_what_is_only_for_the_line_is_nowhere_else(
    run: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replayed run is asked for each time."""
    monkeypatch.setenv("EMA_AVG_RUN_FROM", "x.ema.json")
    outcome = cmd("plan", run)
    assert "warning: EMA_AVG_RUN_FROM: no such setting" in outcome.err
    config.write_text('[run]\nfrom = "x.ema.json"\n')
    assert "from: no such option" in cmd("run", run, "--config", config, "-o", "x", code=2).err


# ---------------------------------------------------------------------------- errors


ERRORS = [
    ("LAST", "x", "EMA_AVG_RUN_LAST: 'x' is not a valid integer"),
    ("NAMES", "both", "EMA_AVG_RUN_NAMES: 'both' is not one of"),
    ("WORKERS", "0", "EMA_AVG_RUN_WORKERS: 0 is not in the range"),
    ("STRICT", "maybe", "EMA_AVG_RUN_STRICT: 'maybe' is not a valid boolean"),
    ("RULE", "a b c", "EMA_AVG_RUN_RULE: expected 2 words for each --rule, found 3"),
    ("DECAY", "1.5", "EMA_AVG_RUN_DECAY: "),
    ("AVERAGE", "nosuch", "EMA_AVG_RUN_AVERAGE: "),
    ("STEPS", "x:y", "EMA_AVG_RUN_STEPS: "),
    ("FORMAT", "zip", "EMA_AVG_RUN_FORMAT: "),
]


@pytest.mark.parametrize(("name", "value", "words"), ERRORS, ids=[row[0] for row in ERRORS])
def test_errors_name_the_variable(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    """Whether the value is refused by its type, or by what it means."""
    monkeypatch.setenv(f"EMA_AVG_RUN_{name}", value)
    assert f"error: {words}" in cmd("run", run, "-o", tmp_path / "o", code=2).err
    assert not (tmp_path / "o").exists()


ENTRIES = [
    ('last = "x"', "[run] last: expected an integer, found 'x'"),
    ("last = 2.5", "[run] last: expected an integer, found 2.5"),
    ("last = true", "[run] last: expected an integer, found True"),
    ("strict = 1", "[run] strict: expected true or false, found 1"),
    ("names = 3", "[run] names: "),
    ('names = "both"', "[run] names: 'both' is not one of"),
    ("decay = true", "[run] decay: expected text, found True"),
    ("decay = 1.5", "[run] decay: "),
    ("decay = {a = 1}", "[run] decay: expected text, found {"),
    ("decay = [0.5]", "[run] decay: expected text, found [0.5]"),
    ("include = [1, [2]]", "[run] include: expected text, found [2]"),
    ('rule = ["a"]', "[run] rule: expected lists of 2 texts"),
    ('rule = [["a"]]', "[run] rule: expected lists of 2 texts"),
    ('rule = "a"', "[run] rule: expected lists of 2 texts"),
    ("rule = [[1, true]]", "[run] rule: expected text, found True"),
    ("decai = 1", "[run] decai: no such option"),
    ("config = 'x'", "[run] config: no such option"),
    ("2020-01-01 = 1", "[run] 2020-01-01: no such option"),
    ("decay = 2020-01-01", "[run] decay: expected text, found datetime"),
    ('"\\u001b[31m" = 1', "[run] \\x1b[31m: no such option"),
]


@pytest.mark.parametrize(("entry", "words"), ENTRIES, ids=[row[0] for row in ENTRIES])
def test_errors_name_the_file_and_the_entry(
    run: Path, config: Path, tmp_path: Path, entry: str, words: str
) -> None:
    """Types are those of TOML: no text for a number, no number for a flag."""
    config.write_text(f"[run]\n{entry}\n")
    err = cmd("run", run, "--config", config, "-o", tmp_path / "o", code=2).err
    assert f"error: --config {config}: {words}" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [("[nosuch]\n", "expected a table"), ("run = 1\n", "expected a table"), ("[run", "no TOML")],
)
def test_files_that_are_no_configuration(run: Path, config: Path, text: str, words: str) -> None:
    """Tables are called as the commands are."""
    config.write_text(text)
    assert words in cmd("plan", run, "--config", config, code=2).err


def test_hostile_nesting_is_an_error(run: Path, config: Path) -> None:
    """A parser that gives up is no internal error."""
    config.write_text(f"[run]\ndecay = {'[' * 20_000}\n")
    assert "no TOML" in cmd("plan", run, "--config", config, code=2).err


def test_a_pair_needs_no_list_of_pairs(run: Path, config: Path) -> None:
    """One value of an option that may be repeated stands for itself."""
    config.write_text('[run]\nrule = ["^", "m/"]\ninclude = "a"\n')
    found = told(run, "--config", config)["request"]
    assert (found["rule"], found["select"]) == ([["^", "m/"]], [["include", "a"]])


# ---------------------------------------------------------------------------- alternatives


def test_one_way_to_ask_for_averages_replaces_the_other(
    run: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decay in the environment is no second average of who asks for a mean."""
    monkeypatch.setenv("EMA_AVG_RUN_DECAY", "0.5")
    monkeypatch.setenv("EMA_AVG_RUN_NUM_UPDATES", "count")
    cmd("run", run, "--average", "mean", "-o", tmp_path / "o.safetensors", "--names", "variable")
    assert read_checkpoint(tmp_path / "o.safetensors")["a"].tolist() == [2.5]
    monkeypatch.delenv("EMA_AVG_RUN_DECAY")
    config.write_text('[run]\naverage = ["mean", "lr:cosine"]\nzero-debias = true\n')
    found = told(run, "--decay", "0.25", "--config", config)["average"]
    assert (found["spec"], found["num_updates"], found["zero_debias"]) == (
        "ema:0.25",
        "count",
        True,
    )


def test_what_is_said_on_one_level_is_meant(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once are two averages; a ramp of a mean is an error where it is asked for."""
    monkeypatch.setenv("EMA_AVG_RUN_DECAY", "0.5")
    monkeypatch.setenv("EMA_AVG_RUN_AVERAGE", "mean")
    averages = json.loads(cmd("plan", run, "--json", "-q").out.splitlines()[-1])["averages"]
    assert [one["average"]["spec"] for one in averages] == ["mean", "ema:0.5"]
    cmd("plan", run, "--average", "mean", "--num-updates", "count", code=2)


# ---------------------------------------------------------------------------- unknown ones


def test_unknown_variables_are_told_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error would go unnoticed otherwise; it is a warning with what was meant."""
    monkeypatch.setenv("EMA_AVG_RUN_DECAI", "0.5")
    outcome = cmd("plan", run, "--json")
    warning = json.loads(outcome.out.splitlines()[0])
    assert warning["type"] == "warning"
    assert "EMA_AVG_RUN_DECAI: no such setting" in warning["message"]
    assert "EMA_AVG_RUN_DECAY" in warning["hint"]
    assert "[unknown-variable]" in outcome.err
    assert cmd("plan", run, "-q").err == ""


def test_known_variables_are_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other commands, of no command, of other programs, and empty ones."""
    for name in ("EMA_AVG_DEBUG", "EMA_AVG_WATCH_INTERVAL", "EMA_AVGX", "EMA_AVG_RUN_DECAY"):
        monkeypatch.setenv(name, "")
    assert "no such setting" not in cmd("plan", run).err

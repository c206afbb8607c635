"""Command line and functions take the same options; ``--json`` is for programs as well."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_run

import ema_cli
from ema_cli.cli import cli

# What only a terminal needs, and what only a program can give.
TERMINAL = {"dry_run", "plot", "json", "quiet", "verbose", "no_color", "config", "help", "python"}
PROGRAM = {"executor", "on_event", "on_report", "stop", "dry_run"}
PAIRS: list[tuple[str, Callable[..., Any]]] = [
    ("run", ema_cli.average_run),
    ("plan", ema_cli.plan_run),
    ("map", ema_cli.restore_map),
    ("diff", ema_cli.diff),
    ("rename", ema_cli.rename),
    ("inspect", ema_cli.inspect),
    ("watch", ema_cli.watch),
    ("verify", ema_cli.verify),
]
EMPTY = inspect.Parameter.empty


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function that the command line can give, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in PROGRAM}


def options(name: str) -> dict[str, Any]:
    """The parameters of a command with their defaults, --include and --exclude as ``select``."""
    found: dict[str, Any] = {}
    command = cli.commands[name]
    with click.Context(command) as context:
        for parameter in command.params:
            key = str(parameter.name)
            if key in TERMINAL:
                continue
            if key in ("include", "exclude"):
                found["select"] = ()
            elif parameter.required:
                found[key] = EMPTY
            else:
                default = parameter.get_default(context)
                missing = type(default).__name__ in ("Sentinel", "NoneType")
                several = getattr(parameter, "multiple", False) or parameter.nargs == -1
                empty: Any = () if several else None
                found[key] = empty if missing else default
    return found


@pytest.mark.parametrize(("name", "function"), PAIRS, ids=[name for name, _ in PAIRS])
def test_options_are_keywords_with_equal_defaults(name: str, function: Callable[..., Any]) -> None:
    """Each option is a keyword of the same name and default, and the other way round."""
    wanted, found = keywords(function), options(name)
    # What an output of ours is named by is told to `inspect` on the terminal only.
    if name == "inspect":
        found.pop("name")
    # A dry run needs no output, so the command line asks for it later.
    if name == "run":
        assert found.pop("output") is None
        wanted.pop("output")
    assert found == wanted


@pytest.mark.parametrize(("name", "function"), PAIRS, ids=[name for name, _ in PAIRS])
def test_how_is_keyword_only(name: str, function: Callable[..., Any]) -> None:
    """What a function works on may be positional; everything else is given by name."""
    arguments = [p.name for p in cli.commands[name].params if isinstance(p, click.Argument)]
    for parameter in inspect.signature(function).parameters.values():
        positional = parameter.name in (*arguments, "output")
        assert (parameter.kind is not parameter.KEYWORD_ONLY) is positional, parameter.name


@pytest.mark.parametrize("function", [ema_cli.average_run, ema_cli.plan_run])
def test_the_two_forms_of_a_run_agree(function: Callable[..., Any]) -> None:
    """`plan_run` takes what `average_run` takes, but for what carrying out needs."""
    only_run = {"overwrite", "restart", "stats", "outliers"}
    wanted = {k: v for k, v in keywords(ema_cli.average_run).items() if k not in only_run}
    found = {k: v for k, v in keywords(function).items() if k not in only_run}
    assert found | {"output": None} == wanted | {"output": None}


def test_every_keyword_is_documented() -> None:
    """The docstrings of the functions with many keywords explain each of them."""
    for function in (ema_cli.average_run, ema_cli.restore_map, ema_cli.rename, ema_cli.verify):
        text = inspect.getdoc(function) or ""
        missing = [p for p in inspect.signature(function).parameters if f"{p}:" not in text]
        assert [name for name in missing if f"{name} implies" not in text] == []


@pytest.mark.parametrize("name", ema_cli.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    """Everything in ``__all__`` exists and says what it is."""
    found = getattr(ema_cli, name)
    assert inspect.getdoc(found)
    assert name in dir(ema_cli)


def test_public_names_are_sorted_and_nothing_else_is_one() -> None:
    """``__all__`` is sorted, and a name that is not there is an AttributeError."""
    assert list(ema_cli.__all__) == sorted(ema_cli.__all__)
    with pytest.raises(AttributeError, match="nosuch"):
        _ = ema_cli.nosuch
    every = {str(function.__name__) for _, function in PAIRS}
    assert every <= set(ema_cli.__all__)


def test_importing_the_package_is_cheap() -> None:
    """``import ema_cli`` alone loads neither numpy nor any other library."""
    program = (
        "import sys, ema_cli\n"
        "print(sorted({'numpy', 'click', 'rich', 'safetensors', 'ml_dtypes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- same behaviour


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints with two tensors."""
    values = [{"a": np.full(3, k, np.float32), "b": np.float32(k)} for k in (1, 2, 3, 4)]
    return write_run(tmp_path / "run", values)


CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"decay": 0.9, "num_updates": "count"}, ["--decay", "0.9", "--num-updates", "count"]),
    ({"decay": "0.99/step", "last": 3}, ["--decay", "0.99/step", "--last", "3"]),
    ({"average": ["mean@last=2"]}, ["--average", "mean@last=2"]),
    ({"zero_debias": True, "decay": 0.5}, ["--zero-debias", "--decay", "0.5"]),
    (
        {"select": [("exclude", "*"), ("include", "b"), ("exclude", "b"), ("include", "a")]},
        ["--exclude", "*", "--include", "b", "--exclude", "b", "--include", "a"],
    ),
    ({"select": [("include", "a"), ("exclude", "a")]}, ["--include", "a", "--exclude", "a"]),
    ({"select": [("exclude", "a"), ("include", "a")]}, ["--exclude", "a", "--include", "a"]),
    ({"rule": [("^", "m.")], "name": "avg"}, ["--rule", "^", "m.", "--name", "avg"]),
    ({"dtype": "float64", "init": "zeros"}, ["--dtype", "float64", "--init", "zeros"]),
]


@pytest.mark.parametrize(("given", "words"), CASES, ids=[str(words) for _, words in CASES])
def test_both_ways_write_the_same_bytes(
    run: Path, tmp_path: Path, given: dict[str, Any], words: list[str]
) -> None:
    """A function call and the command with the same options give the same file."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    cmd("run", run, "-o", one, *words)
    result = ema_cli.average_run(run, two, **given)
    assert one.read_bytes() == two.read_bytes()
    assert [written.path for written in result.outputs] == [str(two)]
    plan = ema_cli.plan_run([run], two, **given)
    assert plan.outcomes[0].weights == result.plan.outcomes[0].weights
    assert read_checkpoint(one)


def test_an_executor_is_used_and_not_shut_down(run: Path, tmp_path: Path) -> None:
    """The caller's executor does the work and stays usable; events reach the callback."""
    events: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        ema_cli.average_run(
            str(run), tmp_path / "o.safetensors", executor=pool, on_event=events.append
        )
        assert pool.submit(int, "7").result() == 7
    assert events[-1].read == events[-1].total > 0


def test_strict_and_overwrite_mean_the_same(run: Path, tmp_path: Path) -> None:
    """The keywords raise what the options exit with."""
    out = tmp_path / "o.safetensors"
    with pytest.raises(ema_cli.EmaError, match="first-dominates") as caught:
        ema_cli.average_run(run, out, decay=0.999, strict=True)
    assert caught.value.exit_code == 2
    ema_cli.average_run(run, out, decay=0.5)
    with pytest.raises(ema_cli.EmaError) as caught:
        ema_cli.average_run(run, out, decay=0.6)
    assert caught.value.exit_code == 14
    ema_cli.average_run(run, out, decay=0.6, overwrite=True)
    again = ema_cli.average_run(run, out, decay=0.6)
    assert [written.status for written in again.outputs] == ["unchanged"]


def test_wrong_words_are_usage_errors_in_the_functions_too(run: Path, tmp_path: Path) -> None:
    """What click refuses as a choice, the function refuses with the same exit code."""
    bad: list[dict[str, Any]] = [
        {"num_updates": "often"},
        {"init": "ones"},
        {"order": "random"},
        {"statistics": "drop"},
        {"shadow_dtype": "float8"},
        {"non_finite": "warn"},
        {"names": "both"},
        {"dtype": "int8"},
        {"format": "zip"},
        {"optimizer": "maybe"},
        {"workers": 0},
        {"last": 0},
        {"select": [("maybe", "a")]},
    ]
    answers = {}
    for keyword in bad:
        try:
            ema_cli.average_run(run, tmp_path / "o.safetensors", overwrite=True, **keyword)
        except Exception as error:
            answers[str(keyword)] = getattr(error, "exit_code", repr(error))
        else:
            answers[str(keyword)] = "accepted"
    assert {keyword: answer for keyword, answer in answers.items() if answer != 2} == {}


def test_diff_map_and_inspect_tell_what_their_functions_return(run: Path) -> None:
    """The JSON of a looking command is the result of its function."""
    a, b = (run / f"model-step-{k}.safetensors" for k in (100, 200))
    told = json.loads(cmd("diff", a, b, "--json", code=13).out)["differences"]
    assert [(d["tensor"], d["kind"]) for d in told] == [
        (d.tensor, d.kind) for d in ema_cli.diff(a, b).differences
    ]
    rows = json.loads(cmd("map", a, "--json", code=13).out)["rows"]
    assert [tuple(row.values()) for row in rows] == [tuple(r) for r in ema_cli.restore_map(a).rows]
    found = json.loads(cmd("inspect", run, "--json").out)["checkpoints"]
    assert [row["step"] for row in found] == ema_cli.inspect(run).steps


# ---------------------------------------------------------------------------- JSON


def documents(text: str) -> list[dict[str, Any]]:
    """Every line of a ``--json`` stdout, each checked for what all have in common."""
    parsed = [json.loads(line) for line in text.splitlines()]
    assert all(doc["schema"] == 1 and type(doc["type"]) is str for doc in parsed)
    assert [doc["type"] in ("result", "error") for doc in parsed].index(True) == len(parsed) - 1
    return parsed


def test_json_lines_end_with_the_result(run: Path, tmp_path: Path) -> None:
    """A plan, then the result with paths, sizes and status; no other text on stdout."""
    out = tmp_path / "o.safetensors"
    *before, result = documents(cmd("run", run, "-o", out, "--decay", "0.5", "--json").out)
    assert [doc["type"] for doc in before] == ["plan"]
    assert result["type"] == "result"
    assert result["command"] == "run"
    assert result["outputs"] == [
        {"path": str(out), "status": "written", "bytes": out.stat().st_size}
    ]
    assert result["read_bytes"] == before[0]["costs"]["read_bytes"] == 4 * 16


def test_json_tells_warnings_too(run: Path, tmp_path: Path) -> None:
    """A warning is a document with its stable code, and stderr says it as well."""
    outcome = cmd("run", run, "-o", tmp_path / "o.safetensors", "--decay", "0.99", "--json")
    found = [doc for doc in documents(outcome.out) if doc["type"] == "warning"]
    assert [doc["warning"] for doc in found] == ["first-dominates"]
    assert "[first-dominates]" in outcome.err


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (["run", "RUN"], 2, "UsageError"),
        (["run", "RUN", "-o", "OUT", "--decay", "2"], 2, "UsageError"),
        (["run", "RUN/none", "-o", "OUT"], 12, "InputError"),
        (["run", "RUN", "-o", "OUT", "--steps", "900:"], 10, "NothingToAverage"),
        (["run", "RUN", "-o", "OUT", "--exclude", "nosuch"], 13, "Disagreement"),
        (["run", "RUN", "-o", "RUN/model-step-300.safetensors"], 14, "OutputExists"),
        (["nosuch"], 2, "UsageError"),
    ],
)
def test_json_ends_with_the_error(
    run: Path, tmp_path: Path, words: list[str], code: int, name: str
) -> None:
    """An error is the last line of stdout as JSON, and is told on stderr in words."""
    paths = {"RUN": str(run), "OUT": str(tmp_path / "o.safetensors")}
    words = [word.replace("RUN", paths["RUN"]).replace("OUT", paths["OUT"]) for word in words]
    outcome = cmd(*words, "--json", code=code)
    last = documents(outcome.out)[-1]
    assert (last["type"], last["code"], last["error"]) == ("error", code, name)
    assert f"ema-avg: error: {last['message']}" in outcome.err

"""What a state is bound to: told as options, read back, compared, refused in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from helpers import cmd, write_checkpoint
from hypothesis import assume, given
from hypothesis import strategies as st
from stores import (
    slot_of,
    tree,
    update,
    values,
    without_barriers,
    write_steps,
)

import ema_cli
from ema_cli import asked
from ema_cli.cli.command import selected
from ema_cli.cli.run import run as command
from ema_cli.errors import OtherSettings, UsageError
from ema_cli.invocation import setting_words
from ema_cli.plan import Request
from ema_cli.states import sealed, settings
from ema_cli.states.binding import RUN, Binding


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the arguments that click makes of a command line after ``ema-avg run``."""
    context = command.make_context("run", list(words))
    arguments = dict(context.params)
    arguments["select"] = selected(context, arguments.pop("include"), arguments.pop("exclude"))
    return arguments


# ---------------------------------------------------------------------------- compared

EMA = {"decay": 0.9}
# What a state has, what is asked for, and what the refusal says.
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "decay": (EMA, {"decay": 0.99}, "--decay: the state has 0.9, asked for 0.99"),
    "per step": (EMA, {"decay": "0.9/step"}, "--decay: the state has 0.9, asked for 0.9/step"),
    "the default": (EMA, {}, "--decay: the state has 0.9, asked for 0.999"),
    "kind": (EMA, {"average": ["mean"]}, "--average: the state has none, asked for mean"),
    "another kind": (
        {"average": ["power:0.1"]},
        {"average": ["half-life:200"]},
        "--average: the state has power:0.1, asked for half-life:200",
    ),
    "one more": (
        {"average": ["mean"]},
        {"average": ["mean", "ema:0.9"]},
        "--average: the state has mean, asked for mean ema:0.9",
    ),
    "their order": (
        {"average": ["ema:0.9", "mean"]},
        {"average": ["mean", "ema:0.9"]},
        "--average: the state has ema:0.9 mean, asked for mean ema:0.9",
    ),
    "label": (
        {"average": ["a=mean"]},
        {"average": ["mean"]},
        "--average: the state has a=mean, asked for mean",
    ),
    "num_updates": (
        {**EMA, "num_updates": "count"},
        {**EMA, "num_updates": "step"},
        "--num-updates: the state has count, asked for step",
    ),
    "init": (EMA, {**EMA, "init": "zeros"}, "--init: the state has none, asked for zeros"),
    "zero_debias": (
        {**EMA, "zero_debias": True},
        EMA,
        "--zero-debias: the state has given, asked for none",
    ),
    "chosen": (
        {**EMA, "select": [("exclude", "bias")]},
        {**EMA, "select": [("exclude", "kernel")]},
        "--include and --exclude: the state has --exclude bias, asked for --exclude kernel",
    ),
    "order of choices": (
        {**EMA, "select": [("exclude", "*"), ("include", "bias")]},
        {**EMA, "select": [("include", "bias"), ("exclude", "kernel")]},
        "--include and --exclude: the state has --exclude * --include bias, asked for --include "
        "bias --exclude kernel",
    ),
    "statistics": (
        EMA,
        {**EMA, "statistics": "copy"},
        "--statistics: the state has none, asked for copy",
    ),
    "statistics of torch": (
        {**EMA, "like": "torch"},
        {**EMA, "like": "torch", "statistics": "average"},
        "--statistics: the state has none, asked for average",
    ),
    "shadow_dtype": (
        {**EMA, "shadow_dtype": "same"},
        EMA,
        "--shadow-dtype: the state has same, asked for none",
    ),
    "like": (EMA, {**EMA, "like": "keras"}, "--like: the state has none, asked for keras"),
    "non_finite": (
        {**EMA, "non_finite": "allow"},
        EMA,
        "--non-finite: the state has allow, asked for none",
    ),
    "name": (
        {**EMA, "name": "it's mine"},
        EMA,
        "--name: the state has it's mine, asked for none",
    ),
    "optimizer": (
        {**EMA, "optimizer": "keep"},
        EMA,
        "--optimizer: the state has keep, asked for none",
    ),
}


@pytest.mark.parametrize(("mine", "other", "said"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_other_settings_are_refused_in_words(
    mine: dict[str, Any], other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Each difference is told, and the hint is the command that goes on."""
    run, state = tmp_path / "a run", tmp_path / "S"
    write_steps(run, [1, 2])
    update(state, run, **mine)
    write_steps(run, [3])
    before = tree(state)
    with pytest.raises(OtherSettings) as caught:
        update(state, run, **other)
    assert caught.value.exit_code == 16
    assert said in caught.value.message and caught.value.message.startswith(str(state))
    with pytest.raises(OtherSettings):
        ema_cli.plan_run(run, state=state, **other)
    assert tree(state) == before
    tool, name, *words = shlex.split(caught.value.hint)
    assert (tool, name) == ("ema-avg", "run") and parsed(words)["runs"] == (str(run),)
    assert "applied  1 checkpoint  step 3" in cmd(name, *words).out
    reference = tmp_path / "reference"
    update(reference, run, **mine)
    assert slot_of(state).read_bytes() == slot_of(reference).read_bytes()


def test_several_differences_are_all_told(tmp_path: Path) -> None:
    """One after the other, on one line."""
    run, state = tmp_path / "run", tmp_path / "S"
    write_steps(run, [1])
    update(state, run, average=["mean"], statistics="copy", name="x")
    words = ("--decay", "0.5", "--non-finite", "allow")
    done = cmd("run", run, "--state", state, *words, code=16)
    for option in ("--average", "--decay", "--statistics", "--name", "--non-finite"):
        assert f"{option}: the state has" in done.err
    assert done.err.count("error: ") == 1


def test_the_hint_keeps_what_was_chosen(tmp_path: Path) -> None:
    """Which new checkpoints are taken is no setting, and none of the hint's business."""
    run, state = tmp_path / "run", tmp_path / "S"
    write_steps(run, [1, 2])
    update(state, run, decay=0.5)
    write_steps(run, [3, 4, 5, 6])
    chosen = {"glob": "model-[3-6]*", "steps": "4::2", "step_from": r"model-(\d)"}
    with pytest.raises(OtherSettings) as caught:
        update(state, run, decay=0.9, output=tmp_path / "x.npz", **chosen)
    words = shlex.split(caught.value.hint)
    assert parsed(words[2:])["output"] == str(tmp_path / "x.npz")
    assert cmd(*words[1:]).out.startswith("applied  2 checkpoints  steps 4 to 6")


def test_how_an_output_looks_may_change(tmp_path: Path) -> None:
    """Settings are what is averaged and how; workers and outputs are not."""
    run, state = tmp_path / "run", tmp_path / "S"
    write_steps(run, [1])
    update(state, run, decay=0.5)
    for k, look in enumerate(
        ({"names": "variable"}, {"dtype": "float64"}, {"format": "npz"}, {"rule": [("^", "a/")]})
    ):
        write_steps(run, [k + 2])
        done = update(state, run, decay=0.5, workers=k + 1, output=tmp_path / f"{k}.npz", **look)
        assert len(done.applied) == len(done.outputs) == 1


def test_the_same_said_in_other_words(tmp_path: Path) -> None:
    """`--decay D` is short for `--average ema:D`, and the ramp is the default."""
    run = tmp_path / "run"
    write_steps(run, [1])
    for k, (one, other) in enumerate(
        (
            ({"decay": "0.9"}, {"average": ["ema:0.9"]}),
            ({"decay": 0.9}, {"average": ["ema-0.9=ema:0.9"]}),
            ({}, {"decay": "0.999", "num_updates": "count"}),
            (
                {"decay": 0.9, "zero_debias": True},
                {"decay": 0.9, "zero_debias": True, "init": "zeros"},
            ),
            ({"decay": 0.9, "steps": ":9"}, {"decay": "0.9", "steps": ":9"}),
        )
    ):
        update(tmp_path / f"{k}", run, **one)
        assert update(tmp_path / f"{k}", run, **other).applied == ()


# ---------------------------------------------------------------------------- impossible

IMPOSSIBLE: dict[str, list[str]] = {
    "a window of steps": ["--average", "ema:0.9@100:"],
    "a window of the last": ["--average", "mean@last=3"],
    "a learning rate": ["--average", "lr:cosine"],
    "lr:linear, which is the mean": ["--average", "lr:linear"],
    "one of several": ["--average", "mean", "--average", "a=lr:1-sqrt"],
    "weights": ["--average", "weights:WEIGHTS"],
    "--last": ["--last", "3"],
    "--order given": ["--order", "given"],
    "--keep-variables": ["--keep-variables"],
}


@pytest.mark.parametrize("words", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_what_a_state_cannot_do(
    words: list[str], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later checkpoints would change the weights of earlier ones: exit 2, and nothing is made."""
    paths = write_steps(tmp_path, [1, 2])
    monkeypatch.chdir(tmp_path)
    Path("WEIGHTS").write_text("1 1\n2 1\n")
    if there:
        update(Path("S"), paths, decay=0.9)
    before = tree(tmp_path)
    done = cmd("run", *paths, "--state", "S", *words, code=2)
    assert "state" in done.err
    cmd("plan", *paths, "--state", "S", *words, code=2)
    assert tree(tmp_path) == before
    assert there or not Path("S").exists()


# ---------------------------------------------------------------------------- there and back

ODD = (
    *("-", "--", "--glob", "--zero-debias", "-n", "a b", "*[!x]", "'", '"', "\\", "\n", "\x1b[0m"),
    *("--exclude", "x --include y", "=", "@", "\ud800", "ü", "{step}", "$HOME", "a=b"),
)
TEXTS = st.text(min_size=1, max_size=8) | st.sampled_from(ODD)
DECAYS = st.floats(0, 1).map(repr) | st.sampled_from(["0", "1", ".5", "0.50", "1e-3", "5E-1", "1."])
FAMILIES = st.one_of(
    DECAYS.map("ema:{}".format),
    DECAYS.map("ema:{}/step".format),
    st.floats(1e-3, 1e9).map("half-life:{}".format),
    st.just("mean"),
    st.floats(0.001, 0.288).map("power:{}".format),
)
LABELS = st.from_regex(r"[A-Za-z0-9._-]{1,6}", fullmatch=True)
NUMBERS = st.none() | st.integers(0, 10**17)


@st.composite
def steps(draw: st.DrawFn) -> str:
    """Draw a choice of steps."""
    start, stop, stride = draw(NUMBERS), draw(NUMBERS), draw(st.none() | st.integers(1, 99))
    ends = ("" if end is None else str(end) for end in (start, stop))
    return ":".join(ends) + ("" if stride is None else f":{stride}")


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Draw arguments of `average_run` that a state may be bound to."""
    averages = st.lists(
        st.tuples(st.none() | LABELS, FAMILIES).map(
            lambda pair: f"{pair[0]}={pair[1]}" if pair[0] else pair[1]
        ),
        max_size=3,
    )
    select = st.lists(st.tuples(st.sampled_from(["include", "exclude"]), TEXTS), max_size=3)
    may = {
        "average": averages,
        "decay": DECAYS,
        "num_updates": st.sampled_from(["none", "count", "step"]),
        "init": st.sampled_from(["first", "zeros"]),
        "zero_debias": st.booleans(),
        "glob": TEXTS,
        "steps": steps(),
        "step_from": TEXTS,
        "key": TEXTS,
        "select": select,
        "statistics": st.sampled_from(["average", "copy"]),
        "shadow_dtype": st.sampled_from(["auto", "same"]),
        "like": st.sampled_from(["tensorflow", "torch", "keras"]),
        "non_finite": st.sampled_from(["error", "allow"]),
        "name": TEXTS,
        "optimizer": st.sampled_from(["auto", "keep", "drop"]),
    }
    return draw(st.fixed_dictionaries({}, optional=may))


def request_of(keywords: Mapping[str, Any]) -> Request:
    """Return a request that a state may be bound to; others are no example."""
    try:
        request = asked.request(**keywords)
        settings.check_possible(request)
    except UsageError:
        assume(False)
    return request


def bound(request: Request) -> Binding:
    """Return what a state is bound to that was begun by a request."""
    labels = tuple(average.label for average in request.averages)
    return Binding(RUN, tuple(setting_words(request)), labels, {})


def meaning(request: Request) -> tuple[Any, ...]:
    """Return what of a request decides about the bits of a state."""
    averages = [(a.label, a.family, a.num_updates, a.init, a.zero_debias) for a in request.averages]
    wishes = request.wishes
    return (
        *(averages, request.choice.key, request.rules, request.statistics, request.shadow_dtype),
        *(request.like, request.non_finite, wishes.name, wishes.optimizer),
    )


@given(arguments())
def test_settings_come_back(keywords: dict[str, Any]) -> None:
    """From words, from the file they stand in, and from a command line."""
    request = request_of(keywords)
    words = setting_words(request)
    line = sealed.seal(bound(request).to_json())
    told = Binding.from_json(sealed.unseal(line[:-1], "plan"), "plan")
    found = settings.bound(told, "plan")
    assert meaning(found) == meaning(request)
    assert setting_words(found) == words
    settings.check_same(told, request, "S")
    try:
        of_command = asked.request(**parsed(["RUN", *words]))
    except click.UsageError as error:  # what a terminal cannot pass on
        raise AssertionError(f"{words}: {error.format_message()}") from None
    assert meaning(of_command) == meaning(request)


@given(arguments(), arguments())
def test_other_settings_are_never_taken(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Whatever they look like in words."""
    first, second = request_of(one), request_of(other)
    if setting_words(first) == setting_words(second):
        assert meaning(first) == meaning(second)
        settings.check_same(bound(first), second, "S")
    else:
        with pytest.raises(OtherSettings, match="the state has"):
            settings.check_same(bound(first), second, "S")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([("exclude", "a --exclude b")], [("exclude", "a"), ("exclude", "b")]),
        ([("exclude", "--include"), ("exclude", "x")], [("exclude", "--include --exclude x")]),
        ([("include", "--glob"), ("include", "x")], [("include", "--glob --include x")]),
    ],
)
def test_words_that_look_like_others(one: list[Any], other: list[Any]) -> None:
    """Patterns may hold spaces and the names of options."""
    first, second = (asked.request(decay=0.5, select=pairs) for pairs in (one, other))
    settings.check_same(bound(first), first, "S")
    with pytest.raises(OtherSettings):
        settings.check_same(bound(first), second, "S")


def test_odd_names_go_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Globs, names and patterns that begin with dashes or hold quotes, from a shell."""
    monkeypatch.chdir(tmp_path)
    odd = "--x 'y' $z"
    for k in (1, 2):
        write_checkpoint(
            tmp_path / "run" / f"m-{k}.safetensors", {**values(k), odd: values(k)["bias"]}
        )
    words = ["--exclude", odd, "--name", "-n", "--glob", "m-*", "--average", "-l-=mean"]
    assert cmd("run", "run", "--state", "S", *words).out.startswith("applied  2")
    assert cmd("run", "run", "--state", "S", *words).out.startswith("unchanged")
    done = cmd("run", "run", "--state", "S", code=16)
    [hint] = [
        line for line in done.err.splitlines() if "--exclude" in line and "ema-avg run" in line
    ]
    again = shlex.split(hint[hint.index("ema-avg run") :])
    assert cmd(*again[1:]).out.startswith("unchanged")
    inspected = cmd("inspect", "S")
    bound = next(line for line in inspected.err.splitlines() if line.startswith("bound to "))
    assert shlex.split(bound.removeprefix("bound to "))[:2] == ["--average", "-l-=mean"]

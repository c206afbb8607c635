"""The words of --average and --decay, and the options beside them: what they mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import write_run

import ema_cli
from ema_cli.averages import (
    Average,
    Ema,
    Family,
    HalfLife,
    LearningRate,
    Mean,
    Power,
    Weights,
    Window,
)
from ema_cli.errors import UsageError
from ema_cli.specs import parse_averages

FILES = {"w.txt": "100 1\n200 3\n", "a@b.txt": "100 1\n", "a@last=2": "100 1\n"}


def parse(*specs: str, decay: str | None = None, **options: Any) -> list[Average]:
    settings = {"num_updates": None, "init": "first", "zero_debias": False, **options}
    return parse_averages(specs, decay, read_text=FILES.__getitem__, **settings)


def refused(*specs: str, decay: str | None = None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        parse(*specs, decay=decay, **options)
    assert caught.value.exit_code == 2
    return caught.value.message


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("ema:0.999", Ema(0.999)),
        ("ema:.5/step", Ema(0.5, per_step=True)),
        ("ema:0", Ema(0.0)),
        ("ema:1", Ema(1.0)),
        ("ema:1e-3", Ema(0.001)),
        ("half-life:1000", HalfLife(1000.0)),
        ("half-life:0.5", HalfLife(0.5)),
        ("mean", Mean()),
        ("lr:linear", LearningRate("linear")),
        ("lr:cosine", LearningRate("cosine")),
        ("lr:1-sqrt", LearningRate("1-sqrt")),
        ("power:0.1", Power(0.1)),
        ("power:0.2886", Power(0.2886)),
        ("weights:w.txt", Weights((("100", 1.0), ("200", 3.0)))),
    ],
)
def test_every_spec(spec: str, family: Family) -> None:
    """Each SPEC names its family; without a window it takes all checkpoints."""
    [average] = parse(spec)
    assert average.family == family
    assert average.window is None
    assert average.spec == spec
    assert (average.num_updates, average.init, average.zero_debias) == ("none", "first", False)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("last=5", Window(last=5)),
        ("100:2000", Window(start=100, stop=2000)),
        ("100:", Window(start=100)),
        (":2000", Window(stop=2000)),
        ("0:0", Window(start=0, stop=0)),
        (":", Window()),
    ],
)
@pytest.mark.parametrize("spec", ["ema:0.9/step", "mean", "weights:w.txt", "weights:a@b.txt"])
def test_every_window(spec: str, text: str, window: Window) -> None:
    """@WINDOW is the last N or steps A to B with open ends, after any SPEC."""
    [average] = parse(f"{spec}@{text}")
    [bare] = parse(spec)
    assert average.window == window
    assert average.family == bare.family
    assert average.spec == f"{spec}@{text}"


@pytest.mark.parametrize(
    "window",
    ["last=0", "last=", "last=-1", "last=x", "5", "1:2:3", "a:b", "", "-1:5", "1:2@last=3"],
)
def test_bad_windows_are_refused(window: str) -> None:
    """A window that is none, or that can hold nothing, is exit code 2."""
    assert "mean@" in refused(f"mean@{window}")


@pytest.mark.parametrize(
    "decay", ["nan", "-1", "1.5", "abc", "0.9/epoch", "0.9/", "inf", "", "/step", "1.0000001"]
)
def test_bad_decays_are_refused(decay: str) -> None:
    """A decay outside [0, 1], NaN or no number is exit code 2, given either way."""
    assert f"ema:{decay}" in refused(decay=decay)
    assert f"ema:{decay}" in refused(f"ema:{decay}")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "ema",
        "mean:3",
        "median",
        "EMA:0.9",
        "lr",
        "lr:",
        "lr:sqrt",
        "half-life:0",
        "half-life:-5",
        "half-life:inf",
        "half-life:nan",
        "half-life:100/step",
        "power:0",
        "power:-0.1",
        "power:0.2887",
        "power:nan",
        "power:x",
        "=mean",
        "my label=mean",
        "label=",
        "0.9",
    ],
)
def test_bad_specs_are_refused(spec: str) -> None:
    """What is no average is exit code 2 and quoted."""
    assert f"'{spec.rpartition('=')[2]}" in refused(spec) or f"'{spec}'" in refused(spec)


def test_power_width_ends_at_one_over_root_twelve() -> None:
    """The widest power average is below 12^-½, where γ reaches 0."""
    below = math.nextafter(12**-0.5, 0)
    assert parse(f"power:{below!r}")[0].family == Power(below)
    assert "power" in refused(f"power:{12**-0.5!r}")


# ---------------------------------------------------------------------------- options


def test_nothing_given() -> None:
    """Without any average it is decay 0.999 with TensorFlow's ramp counted in updates."""
    [average] = parse()
    assert average.family == Ema(0.999)
    assert average.num_updates == "count"
    assert average.init == "first"


def test_ramp_is_off_once_a_decay_is_given() -> None:
    """The default ramp belongs to the default decay alone; `none` turns it off there too."""
    assert parse(decay="0.999")[0].num_updates == "none"
    assert parse("ema:0.999")[0].num_updates == "none"
    assert parse(num_updates="none")[0].num_updates == "none"
    assert parse(num_updates="step")[0].num_updates == "step"


def test_decay_is_short_for_ema() -> None:
    """--decay D[/step] means --average ema:D[/step] and stands beside other averages."""
    assert parse(decay="0.99/step") == parse("ema:0.99/step")
    assert [a.family for a in parse("mean", decay="0.9")] == [Mean(), Ema(0.9)]


@pytest.mark.parametrize("num_updates", ["none", "count", "step"])
def test_options_reach_every_exponential_average(num_updates: str) -> None:
    """num_updates and init hold for ema and half-life; the others are left as they are."""
    found = parse("ema:.9", "mean", "half-life:9", num_updates=num_updates, init="zeros")
    assert [a.num_updates for a in found] == [num_updates, "none", num_updates]
    assert [a.init for a in found] == ["zeros", "first", "zeros"]


def test_zero_debias_implies_zeros() -> None:
    """--zero-debias starts from zeros as TensorFlow does for a plain tensor."""
    [average] = parse("ema:0.9", zero_debias=True)
    assert average.zero_debias
    assert average.init == "zeros"


@pytest.mark.parametrize(
    "options", [{"num_updates": "count"}, {"init": "zeros"}, {"zero_debias": True}]
)
@pytest.mark.parametrize("spec", ["mean", "lr:cosine", "power:0.1", "weights:w.txt"])
def test_options_without_an_exponential_average(spec: str, options: dict[str, Any]) -> None:
    """An option that would change nothing is exit code 2."""
    assert spec in refused(spec, **options)
    assert parse(spec, num_updates="none")[0].num_updates == "none"


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("num_updates", "counts"),
        ("init", "frist"),
        ("order", "steps"),
        ("statistics", "average "),
        ("shadow_dtype", "float32"),
        ("non_finite", "alow"),
        ("names", "shadows"),
        ("dtype", "half"),
        ("dtype", "int32"),
        ("dtype", "float8_e4m3fn"),
        ("format", "numpy"),
        ("like", "pytorch"),
        ("unknown", "keeep"),
        ("optimizer", "dorp"),
    ],
)
def test_unknown_words_are_refused(option: str, word: str, tmp_path: Path) -> None:
    """A misspelt word in the Python interface is a usage error, never another meaning."""
    run = write_run(tmp_path / "run", [{"w": [1.0]}, {"w": [2.0]}])
    with pytest.raises(UsageError):
        ema_cli.plan_run(run, tmp_path / "out.safetensors", decay=0.5, **{option: word})


# ---------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("ema:0.999/step@100:200", "ema-0.999-step-100-200"),
        ("mean@last=5", "mean-last-5"),
        ("lr:1-sqrt", "lr-1-sqrt"),
        ("final=mean", "final"),
        ("a.b_c-9=ema:0.9@last=5", "a.b_c-9"),
    ],
)
def test_labels(spec: str, label: str) -> None:
    """The label given, else the SPEC with `-` for all but letters, digits and dots."""
    assert parse(spec)[0].label == label


def test_label_is_not_part_of_the_average() -> None:
    """LABEL= names an average and changes nothing else; `=` in a window is no label."""
    [named], [bare] = parse("x=ema:0.9@last=5"), parse("ema:0.9@last=5")
    assert named.family == bare.family
    assert named.window == bare.window == Window(last=5)
    assert named.spec == bare.spec


@pytest.mark.parametrize(
    "specs", [("mean", "mean"), ("x=mean", "x=ema:0.9"), ("ema:0.9", "ema-0.9=mean")]
)
def test_equal_labels_are_refused(specs: tuple[str, str]) -> None:
    """Two averages of one label, given or derived, are exit code 2."""
    assert "two averages" in refused(*specs)


def test_decay_may_repeat_no_average() -> None:
    """--decay 0.9 beside --average ema:0.9 is the same average twice."""
    assert "'ema-0.9'" in refused("ema:0.9", decay="0.9")

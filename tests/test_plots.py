"""What is drawn in a terminal: bars beside the numbers, plots of many checkpoints."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_run
from terminal import COLOR, held

from ema_cli.cli import plotview
from ema_cli.views import Screen, bars

TSV = "checkpoint\tstep\tcoefficient\tweight\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """It is one."""
        return True


def drawn(
    course: plotview.Course, width: int, *, blocks: bool = True, verbose: bool = False
) -> list[str]:
    """Return the lines a terminal is shown."""
    stream = Terminal()
    screen = Screen(stream, stream.write, width, blocks, False)
    plotview.draw(screen, course, verbose=verbose)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def course(count: int, labels: Sequence[str] = ("mean",), name: str = "c-{}") -> plotview.Course:
    """Return equal weights, and the coefficients of a mean."""
    weights, coefficients = [1 / count] * count, [1 / (k + 1) for k in range(count)]
    return plotview.Course(
        [name.format(k) for k in range(count)],
        [100 * (k + 1) for k in range(count)],
        [plotview.Curve(label, "mean", weights, coefficients) for label in labels],
    )


def folder(path: Path, count: int) -> Path:
    """Write a run with one small tensor."""
    return write_run(path, [{"v": np.float32([k])} for k in range(count)])


# ---------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("value", "width", "shown", "ascii_shown"),
    [
        (8, 4, "████", "####"),
        (4, 4, "██", "##"),
        (5, 4, "██▌", "##"),
        (1, 1, "▏", "#"),
        (1e-9, 4, "▏", "#"),
        (0, 4, "", ""),
        (-1, 4, "", ""),
        (math.nan, 4, "", ""),
        (math.inf, 4, "████", "####"),
        (9, 4, "████", "####"),
    ],
)
def test_a_bar_has_eighths(value: float, width: int, shown: str, ascii_shown: str) -> None:
    """What is not zero shows, and nothing is longer than its width."""
    assert bars.bar(value, 8, width) == shown
    assert bars.bar(value, 8, width, blocks=False) == ascii_shown


def test_a_bar_of_nothing_is_empty() -> None:
    """Where all weights are zero there is no largest one to compare with."""
    assert bars.bar(0, 0, 8) == bars.bar(1, 0, 8) == ""


def test_a_sparkline_has_a_character_for_each_value() -> None:
    """Eight levels; zero is a blank, what is hardly more is not."""
    assert bars.sparkline([0, 1, 2, 3, 4, 5, 6, 7, 8]) == " ▁▂▃▄▅▆▇█"
    assert bars.sparkline([1e-9, 8]) == "▁█"
    assert bars.sparkline([0, 3, 7], blocks=False) == " -#"
    assert bars.sparkline([]) == ""


def test_a_plot_has_columns_labels_and_steps() -> None:
    """The largest value at the top, zero at the bottom; first, middle and last step below."""
    assert bars.plot([1, 2, 4, 3], [100, 200, 300, 400], 26, 2) == [
        "4 ┤          ▄▄▄▄▄▄▄▄▄▄▄"[:13] + "█████▄▄▄▄▄",
        "0 ┤▄▄▄▄▄███████████████"[:3] + "▄▄▄▄▄███████████████",
        "   100     300      400",
    ]
    assert bars.plot([1, 2, 4, 3], [1, 2, 3, 4], 7, 2, blocks=False) == [
        "4 |  ##",
        "0 |####",
        "   1  4",
    ]
    assert bars.plot([2], [7], 5, 1, margin=2) == [" 2 ┤██"[:3] + "┤█", "    7"]


def test_neighbours_share_a_column_of_which_the_largest_counts() -> None:
    """Nothing that stands out is averaged away."""
    assert bars.binned([0, 9, 1, 2, 0, 0], 3) == [9, 2, 0]
    lines = bars.plot([0.0] * 500 + [1.0] + [0.0] * 499, list(range(1000)), 43, 3)
    assert sum("█" in line for line in lines) == 3
    assert max(map(len, lines)) <= 43


def test_panels_stand_side_by_side() -> None:
    """Each as wide as its widest line, whatever their heights."""
    assert bars.beside([["a", "bbb"], ["c"]], 2) == ["a    c", "bbb"]


@pytest.mark.parametrize(
    ("environ", "encoding", "blocks"),
    [
        ({"TERM": "xterm"}, "utf-8", True),
        ({"TERM": "dumb"}, "utf-8", False),
        ({"LANG": "C"}, "utf-8", False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, "utf-8", False),
        ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, "utf-8", False),
        ({"LANG": "en_US.UTF-8"}, "utf-8", True),
        ({"LC_CTYPE": "C.UTF-8"}, "utf-8", True),
        ({"LANG": "en_US.UTF-8"}, "latin-1", False),
        ({}, "ascii", False),
        ({}, "nosuch", False),
    ],
)
def test_block_characters_are_for_who_can_show_them(
    environ: dict[str, str], encoding: str, blocks: bool
) -> None:
    """Not where the stream cannot encode them, nor in a locale that asks for ASCII."""
    assert bars.has_blocks(_Encoded(encoding), environ) is blocks


class _Encoded(io.StringIO):
    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._told = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """What a stream of this encoding says."""
        return self._told


# ---------------------------------------------------------------------------- drawing


def test_bars_stand_beside_the_numbers() -> None:
    """First the coefficient, then the weight; both still told as numbers."""
    assert drawn(course(4), 60) == [
        "checkpoint   step   coefficient          weight",
        "─" * 60,
        "c-0           100             1   ████   25.0 %   ██████████",
        "c-1           200           0.5   ██     25.0 %   ██████████",
        "c-2           300   0.333333333   █▍     25.0 %   ██████████",
        "c-3           400          0.25   █      25.0 %   ██████████",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("count", [1, 2, 20, 40, 41, 500])
@pytest.mark.parametrize("averages", [1, 2, 6])
@pytest.mark.parametrize("blocks", [True, False])
def test_nothing_is_wider_than_the_terminal(
    width: int, count: int, averages: int, blocks: bool
) -> None:
    """However many checkpoints and averages; without block characters all of it is ASCII."""
    labels = [f"ema-{k}-with-a-long-label" for k in range(averages)]
    lines = drawn(course(count, labels), width, blocks=blocks)
    assert max(map(len, lines)) <= width
    if not blocks:
        assert not re.search("[▁-█▏┤]", "".join(lines))


def test_averages_stand_side_by_side_as_far_as_they_fit() -> None:
    """One header line of checkpoints per table: three tables in 60 columns, one in 200."""
    heads = {
        width: sum("checkpoint" in line for line in drawn(course(3, ["a", "b", "c"]), width))
        for width in (60, 100, 200)
    }
    assert heads == {60: 3, 100: 2, 200: 1}
    rows = {
        width: sum(line.count("weight of 50 checkpoints") == 3 for line in lines)
        for width in (60, 200)
        if (lines := drawn(course(50, ["a", "b", "c"]), width))
    }
    assert rows == {60: 0, 200: 1}


def test_names_are_folded_and_never_interpreted() -> None:
    """Markup, emoji codes and escapes are shown as they are; nothing is cut off."""
    name = "[red]:boom:[/red]\x1b[31m-" + "x" * 120 + "-{}"
    lines = drawn(course(1, ["[bold]label"], name), 80)
    text = "".join(re.split("   +", line.strip())[0] for line in lines[2:])
    assert "[red]:boom:[/red]\\x1b[31m-" in text
    assert text.count("x") == 121
    assert "\x1b" not in "".join(lines)


def test_many_checkpoints_become_plots_and_verbose_keeps_the_table() -> None:
    """Forty have a row each, forty-one do not."""
    assert len(drawn(course(40), 80)) == 42
    many = drawn(course(41), 80)
    assert "weight of 41 checkpoints" in many
    assert not any(line.startswith("c-") for line in many)
    assert sum(line.startswith("c-") for line in drawn(course(41), 80, verbose=True)) == 41


def test_both_plots_have_their_columns_above_each_other() -> None:
    """One margin, although `weight` and `coefficient` have labels of different widths."""
    places = {line.index("┤") for line in drawn(course(100), 80) if "┤" in line}
    assert len(places) == 1


# ---------------------------------------------------------------------------- commands


def test_plan_draws_on_a_terminal_and_is_data_in_a_pipe(tmp_path: Path) -> None:
    """The same command, looked at and piped."""
    run = folder(tmp_path / "run", 3)
    words = ["plan", run, "--decay", "0.5"]
    with held(tmp_path, words, columns=100, both=True) as looked_at:
        code, _, shown = looked_at.ended()
    assert code == 0
    assert "model-step-300.safetensors" in shown and "██" in shown
    assert "effective number of checkpoints 2.7, mean age 75 steps" in shown
    piped = cmd(*words).out
    assert TSV + "model-step-100.safetensors\t100\t1\t25.0 %\n" in piped
    assert "█" not in piped


def test_plan_of_many_checkpoints_is_a_plot_on_a_terminal(tmp_path: Path) -> None:
    """In ASCII where the terminal is dumb; in a pipe the table stays."""
    run = folder(tmp_path / "run", 45)
    words = ["plan", run, "--average", "mean", "--average", "ema:0.9"]
    for env, mark in (({}, "█"), ({"TERM": "dumb"}, "#"), ({"LC_ALL": "C"}, "#")):
        with held(tmp_path, words, columns=100, both=True, env=env) as looked_at:
            _, _, shown = looked_at.ended()
        assert shown.count("weight of 45 checkpoints") == 2
        assert mark in shown and ("█" in shown) is (mark == "█")
    assert cmd(*words).out.count("model-step-") == 45


def test_run_draws_on_stderr_and_leaves_stdout_to_data(tmp_path: Path) -> None:
    """One line for each output on stdout; with -q or --json nothing is drawn."""
    run = folder(tmp_path / "run", 3)
    for number, (more, looks) in enumerate((([], True), (["-q"], False), (["--json"], False))):
        out = tmp_path / f"o{number}.safetensors"
        with held(tmp_path, ["run", run, "-o", out, "--decay", "0.5", *more], columns=90) as one:
            code, told, shown = one.ended()
        assert code == 0
        assert ("██" in shown) is looks
        assert "██" not in told
        if more != ["--json"]:
            assert told == f"written  {out.stat().st_size} bytes  {out}\n"


def test_a_state_is_drawn_as_a_plan_is(tmp_path: Path) -> None:
    """By the run that continues it, and by `inspect`."""
    run, state = folder(tmp_path / "run", 3), tmp_path / "state"
    with held(tmp_path, ["run", run, "--state", state, "--decay", "0.5"], columns=90) as one:
        _, told, shown = one.ended()
    assert "██" in shown
    assert told == f"applied  3 checkpoints  steps 100 to 300  {state}\n"
    with held(tmp_path, ["inspect", state], columns=90, both=True) as one:
        _, _, shown = one.ended()
    assert "██" in shown and "effective number of checkpoints 2.7" in shown
    assert cmd("inspect", state).out.startswith(TSV)


@pytest.mark.parametrize("how", [{"env": {"NO_COLOR": "1"}}, {"words": ["--no-color"]}])
def test_nothing_needs_color(tmp_path: Path, how: dict[str, dict[str, str]]) -> None:
    """Without colors the drawing is the same."""
    run = folder(tmp_path / "run", 3)
    words = ["plan", run, "--decay", "0.5"]
    with held(tmp_path, words, columns=90, both=True) as one:
        _, _, colored = one.ended()
    plain = [*words, *how.get("words", [])]
    with held(tmp_path, plain, columns=90, both=True, env=how.get("env")) as one:
        _, _, shown = one.ended()
    assert "\x1b[1m" in colored
    assert "\x1b" not in shown
    kept = [line for line in COLOR.sub("", colored).splitlines() if "free" not in line]
    assert kept == [line for line in COLOR.sub("", shown).splitlines() if "free" not in line]


def test_a_summary_tells_how_much_an_average_is_worth(tmp_path: Path) -> None:
    """In a pipe too: effective number and mean age stand below the weights."""
    run = folder(tmp_path / "run", 3)
    told = cmd("run", run, "-o", tmp_path / "o.safetensors", "--decay", "0.5").err.splitlines()
    at = next(k for k, line in enumerate(told) if "3 checkpoints averaged" in line)
    assert told[at + 1] == "  effective number of checkpoints 2.7, mean age 75 steps"

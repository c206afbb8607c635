"""``inspect RUN``: the checkpoints of a run over its steps, and the gaps between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_run
from terminal import held

from ema_cli.cli import timeline
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.tensors import Checkpoint, Index


def fake(steps: Sequence[int], passed_over: Sequence[PassedOver] = ()) -> Run:
    """Return a run with checkpoints at these steps."""
    index = Index("safetensors", (), (), ())
    checkpoints = tuple(Checkpoint(f"c-{step}", (), (), index, step) for step in steps)
    return Run(checkpoints, tuple(passed_over), searched=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100 to 1000 without 400, 500 and 600; 800 is damaged, and something else lies there."""
    folder = write_run(tmp_path / "run", [{"v": np.float32([k])} for k in range(10)])
    for step in (400, 500, 600):
        (folder / f"model-step-{step}.safetensors").unlink()
    damaged = folder / "model-step-800.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / "notes-500.txt").write_text("none")
    return folder


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([100], []),
        ([100, 900], []),
        ([100, 200, 300], []),
        ([100, 200, 500], []),
        ([100, 400, 500, 600], [(100, 400, 2, 100)]),
        ([0, 100, 200, 300, 400, 500, 900, 1000], [(500, 900, 3, 100)]),
        ([100, 199, 301, 400, 600], [(400, 600, 1, 99)]),
        ([1, 10, 100, 1000, 10000], []),
        ([1000, 2000, 3000, 3100, 3200], []),
        ([300, 100, 200], []),
    ],
)
def test_a_gap_is_where_the_usual_distance_suggests_more(
    steps: list[int], found: list[tuple[int, int, int, int]]
) -> None:
    """Only where a distance is usual: about the same for most neighbours."""
    assert [tuple(gap) for gap in timeline.gaps(steps)] == found


def test_marks_stand_over_their_steps() -> None:
    """First and last step at the ends; every kind has a mark and a word of its own."""
    passed = [PassedOver("x/c-150", "r"), PassedOver("x/c-300", "r", unusable=True)]
    run = fake([100, 200, 500, 600], [*passed, PassedOver("readme", "r")])
    assert timeline.lines(run, 51, blocks=True) == [
        "█    o    █         x         ·         █         █",
        "100                                             600",
        "█ checkpoint   o passed over   x unusable",
        "· missing",
    ]


def test_one_checkpoint_is_a_mark() -> None:
    """At its step, which is told once."""
    assert timeline.lines(fake([7]), 40, blocks=False) == ["#", "7", "# checkpoint"]


def test_what_shares_a_character_is_said() -> None:
    """A damaged entry is never hidden by a checkpoint."""
    crowd = fake(list(range(0, 1000, 2)), [PassedOver("c-501", "r", unusable=True)])
    lines = timeline.lines(crowd, 50, blocks=True)
    assert lines[0] == "█" * 24 + "x" + "█" * 25
    assert lines[-1] == "one character is about 19 steps"


def test_a_number_far_away_does_not_squeeze_the_run() -> None:
    """A name with a step far beyond the run has no place on the line."""
    far = fake([100, 200, 300], [PassedOver("c-99999999", "r", unusable=True)])
    assert timeline.lines(far, 21, blocks=False)[:2] == [
        "#         #         #",
        "100               300",
    ]


@pytest.mark.parametrize("width", [1, 5, 40, 80, 200])
def test_no_line_is_wider_than_it_may_be(width: int) -> None:
    """But for words, which are whole, and numbers."""
    passed = [PassedOver("c-5", "r"), PassedOver("c-6", "r", unusable=True)]
    for line in timeline.lines(fake([1, 2, 3, 4, 9, 10], passed), width, blocks=True):
        assert len(line) <= max(width, len("one character is about 9 steps"))


def test_gaps_are_told_in_words_and_in_json(run: Path) -> None:
    """The table on stdout stays what it is."""
    told = cmd("inspect", run, code=3)
    assert "gap: steps 300 to 700 (3 missing at 100 apart)\n" in told.err
    assert "gap: steps 700 to 900 (1 missing at 100 apart)\n" in told.err
    assert told.out.startswith("checkpoint\tstep\ttensors\tbytes\n")
    assert len(told.out.splitlines()) == 7
    document = json.loads(cmd("inspect", run, "--json", code=3).out)
    assert document["gaps"] == [
        {"after": 300, "before": 700, "missing_count": 3, "apart": 100},
        {"after": 700, "before": 900, "missing_count": 1, "apart": 100},
    ]


def test_a_terminal_is_shown_the_timeline(run: Path, tmp_path: Path) -> None:
    """With a legend of what occurs; nothing of it in a pipe."""
    for env, mark in (({}, "█"), ({"LC_ALL": "C"}, "#")):
        with held(tmp_path, ["inspect", run], columns=80, both=True, env=env) as looked_at:
            code, _, shown = looked_at.ended()
        assert code == 3
        assert f"{mark} checkpoint   o passed over   x unusable   " in shown
        assert "gap: steps 300 to 700" in shown
    assert "unusable   " not in cmd("inspect", run, code=3).out

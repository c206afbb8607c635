"""Plans of states that lie, with checksums that fit: they are checked before they are believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import cmd
from stores import (
    Files,
    document,
    rewrite,
    slot_of,
    update,
    what_counts,
    without_barriers,
    write_steps,
)

import ema_cli
from ema_cli.errors import DamagedState, Disagreement, OtherSettings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


HOSTILE: dict[str, Any] = {
    **{
        f"settings {value!r}"[:40]: {"settings": value}
        for value in (None, 1, "--decay 0.5", {}, [1], [None], [["--decay", "0.5"]], {"decay": 0.5})
    },
    **{
        f"words {' '.join(words)}"[:60]: {"settings": words}
        for words in (
            [],
            ["--decay"],
            ["--decay", "2"],
            ["--decay", "nan"],
            ["0.5"],
            ["--decay", "0.5", "x"],
            ["--decay", "0.5", "--decay", "0.5"],
            ["--decay", "0.50"],
            ["--last", "3", "--decay", "0.5"],
            ["--decay", "0.5", "--order", "given"],
            ["--average", "mean@last=2"],
            ["--average", "lr:cosine"],
            ["--average", "weights:/etc/passwd"],
            ["--average", "a=weights:/dev/stdin"],
            ["--decay", "0.5", "--output", "x"],
            ["--decay", "0.5", "--runs", "x"],
            ["--decay", "0.5", "--workers", "9999"],
            ["--decay", "0.5", "--keep-variables", "yes"],
            ["--decay", "0.5", "--zero_debias"],
            ["--decay", "0.5", "--where", "x"],
            ["--decay", "0.5", "--others", "x"],
            ["--decay", "0.5", "--rule", "xy"],
            ["--decay", "0.5", "--select", "x"],
            ["--decay", "0.5", "--like", "me"],
            ["--decay", "0.5", "--steps", "x"],
            ["--decay", "0.5", "--num-updates", "many"],
            ["--decay", "0.5", "--name", "x", "--exclude"],
        )
    },
    **{f"averages {value!r}": {"averages": value} for value in (None, 1, {}, [], "ema-0.5", [1])},
    "other labels": {"averages": ["ema-0.9"]},
    "more labels": {"averages": ["ema-0.5", "mean"]},
    "a label in a list": {"averages": [["ema-0.5"]]},
    **{
        f"averaged {value!r}"[:50]: {"averaged": value}
        for value in (
            *(None, 1, {}, "x", [1], [[]], [["kernel"]], [["kernel", "float32"]]),
            *([["kernel", "float32", 3]], [["kernel", "float33", [3, 5]]], [[1, "float32", []]]),
            *(
                [["kernel", ["float32"], [3, 5]]],
                [["kernel", "float32", ["3", 5]]],
                [["x", "int8", []]],
            ),
            *([["kernel", "float32", [[3], 5]]], [["kernel", "float32", [3, 5], 1]]),
        )
    },
    "by somebody": {"by": "me"},
    "by the class": {"by": "class"},
}


@pytest.fixture(scope="module", name="made")
def state_to_damage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Files]:
    """A state, its run with one checkpoint more, and what goes on from it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        without_barriers(patch)
        paths = write_steps(folder / "run", [1, 2, 3])
        update(folder / "S", paths[:2], decay=0.5)
        shutil.copytree(folder / "S", folder / "after")
        update(folder / "after", paths, decay=0.5)
    return folder / "S", folder / "run", what_counts(folder / "after")


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_plan_is_refused(
    change: dict[str, Any], made: tuple[Path, Path, Files], tmp_path: Path
) -> None:
    """With checksums that fit: an error, or what a sound one leads to."""
    state = Path(shutil.copytree(made[0], tmp_path / "S"))
    rewrite(state, plan={**document(state, "plan"), **change})
    before = what_counts(state)
    commands: dict[str, Callable[[], object]] = {
        "inspect": lambda: ema_cli.inspect(state),
        "export": lambda: ema_cli.export(state, tmp_path / "out.safetensors"),
        "plan": lambda: ema_cli.plan_run(made[1], state=state, decay=0.5),
        "run": lambda: update(state, made[1], decay=0.5),
    }
    refused = set()
    for name, carry_out in commands.items():
        try:
            carry_out()
        except DamagedState:
            refused.add(name)
        except (OtherSettings, Disagreement):  # it tells of another run then
            assert name in ("plan", "run")
            refused.add(name)
    assert refused or change == {"by": "me"}
    if "run" in refused:
        assert what_counts(state) == before
    else:
        assert slot_of(state).read_bytes() in made[2].values()
        assert ema_cli.inspect(state).step == 3


@pytest.mark.parametrize("plan", [None, 1, [], "x", b"[" * 100_000, b"NaN", b"{", b"1" * 5000])
def test_what_is_no_plan_is_refused(
    plan: Any, made: tuple[Path, Path, Files], tmp_path: Path
) -> None:
    """Any other JSON, and what is none."""
    state = Path(shutil.copytree(made[0], tmp_path / "S"))
    rewrite(state, plan=b"null" if plan is None else plan)
    for words in (["inspect", state], ["run", made[1], "--state", state, "--decay", "0.5"]):
        assert "plan" in cmd(*words, code=12).err


def test_a_plan_in_another_hand_stays_valid(made: tuple[Path, Path, Files], tmp_path: Path) -> None:
    """What another version wrote with other spaces is never judged by how this one would."""
    state = Path(shutil.copytree(made[0], tmp_path / "S"))
    plan = json.dumps({**document(state, "plan"), "more": 1.0}, indent=None).encode()
    rewrite(state, plan=plan)
    update(state, made[1], decay=0.5)
    assert ema_cli.inspect(state).step == 3
    assert slot_of(state).read_bytes() in made[2].values()

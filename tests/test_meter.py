"""Progress: one changing line on a terminal, a line per tenth elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_run
from terminal import COLOR, held, screen

import ema_cli
from ema_cli.engine import Progress
from ema_cli.text import checkpoints
from ema_cli.views import Out
from ema_cli.views.meter import ERASE, Meter, arranged

GB = 10**9
COLORED = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3|4|9|10)[0-9][0-9;]*m")
FACTS = ["37 %", "15.2 GiB of 41.0 GiB", "3.1 GB/s", "9 s left"]
WHAT = "20 checkpoints, steps 100 to 2,000"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Watched:
    """A meter, its clock and what it wrote."""

    def __init__(self, *, live: bool) -> None:
        self.now = 1000.0
        self.stream = Terminal()
        self.meter = Meter(
            self.stream, live=live, color=False, write=self.stream.write, clock=lambda: self.now
        )

    def told(self, seconds: float, read: int, total: int = 100 * GB, **more: int | str) -> str:
        """What is written for an event so many seconds after the one before."""
        self.now += seconds
        before = len(self.stream.getvalue())
        self.meter.show(Progress(read, total, **more))  # type: ignore[arg-type]
        return self.stream.getvalue()[before:]


# ---------------------------------------------------------------------------- lines


def test_elsewhere_there_is_a_line_per_tenth() -> None:
    """With bytes of all, bytes per second and the time left; nothing in between."""
    watched = Watched(live=False)
    watched.told(0, 0)
    told = [watched.told(1, k * GB) for k in range(1, 101)]
    assert [k for k, text in enumerate(told, 1) if text] == list(range(10, 101, 10))
    assert told[29] == "30 %  27.9 GiB of 93.1 GiB  1.0 GB/s  1 min 10 s left\n"
    assert told[99] == "100 %  93.1 GiB of 93.1 GiB  1.0 GB/s  finishing\n"


def test_short_work_is_silent() -> None:
    """Nothing before two seconds, even at the end."""
    watched = Watched(live=False)
    assert "".join(watched.told(0.019, k * GB) for k in range(101)) == ""


def test_the_rate_counts_from_the_work_s_own_beginning() -> None:
    """An hour between two works of a watch is no part of the second one."""
    watched = Watched(live=False)
    watched.told(0, 0)
    watched.told(10, 100 * GB)
    assert watched.told(3600, 0) == ""
    assert "  1.0 GB/s  50 s left" in watched.told(50, 50 * GB)
    assert watched.told(60, 0, 10 * GB) == ""
    assert watched.told(2, 4 * GB, 10 * GB).startswith("40 %  3.7 GiB of 9.3 GiB  2.0 GB/s  3 s")


def test_what_another_process_had_done_is_no_speed() -> None:
    """A resumed run is told from where it went on."""
    watched = Watched(live=False)
    watched.told(0, 0)
    assert watched.told(0, 60 * GB, earlier=60 * GB) == ""
    told = watched.told(5, 70 * GB, earlier=60 * GB)
    assert told == "70 %  65.2 GiB of 93.1 GiB  2.0 GB/s  15 s left\n"


@pytest.mark.parametrize(
    ("seconds", "read", "told"),
    [
        (10, 10**6, "100.0 kB/s  277 h 46 min left"),
        (10, 10**9, "100.0 MB/s  16 min 30 s left"),
        (4, 10**9, "250.0 MB/s  6 min 36 s left"),
    ],
)
def test_rates_and_times_have_fitting_units(seconds: float, read: int, told: str) -> None:
    """Down to kilobytes, up to hours."""
    watched = Watched(live=True)
    watched.told(0, 0)
    assert told in watched.told(seconds, read)


# ---------------------------------------------------------------------------- a terminal


def test_a_terminal_sees_it_after_half_a_second_and_ten_times_a_second() -> None:
    """But the last event is always shown: what follows it may take long."""
    watched = Watched(live=True)
    watched.told(0, 0)
    assert watched.told(0.49, GB) == ""
    assert watched.told(0.02, 2 * GB).startswith("\r")
    assert watched.told(0.09, 3 * GB) == ""
    assert watched.told(0.02, 4 * GB).startswith("\r")
    assert "finishing" in watched.told(0.01, 100 * GB)
    watched.meter.clear()
    assert watched.stream.getvalue().endswith(ERASE)
    written = watched.stream.getvalue()
    watched.meter.clear()
    assert watched.stream.getvalue() == written


@pytest.mark.parametrize("width", range(1, 140))
def test_a_line_has_room_on_any_terminal(width: int) -> None:
    """What is less important goes first."""
    title, bar, told = arranged(WHAT, FACTS, width)
    assert sum(len(part) + 2 for part in (title, "#" * bar) if part) + len(told) <= width
    assert ("37 %" in told) == (width >= len("37 %"))
    assert bool(title) <= bool(bar) <= (told.endswith("9 s left"))


def test_what_is_less_important_goes_first() -> None:
    """What is worked on, the bar, the bytes and the rate; the share is told last of all."""
    told = [arranged(WHAT, FACTS, width) for width in (120, 85, 65, 48, 30, 20, 8, 3)]
    assert [title for title, *_ in told] == [WHAT, "20 checkpoints", *[""] * 6]
    assert [bar > 0 for _, bar, _ in told] == [True, True, False, False, False, False, False, False]
    assert [line for *_, line in told][3:] == [
        "  ".join(FACTS),
        "37 %  3.1 GB/s  9 s left",
        "37 %  9 s left",
        "37 %",
        "",
    ]


def test_no_line_of_another_kind_stands_on_the_line_of_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Warnings, talk, data, tables, errors: the progress is taken away first."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("ema_cli.views.meter.FIRST_DRAWN", 0.0)
    monkeypatch.setattr("ema_cli.views.meter._BETWEEN", 0.0)
    out = Out(color=False, verbose=True)
    says = [
        lambda: out.say("said"),
        lambda: out.detail("detailed"),
        lambda: out.line("data"),
        lambda: out.warning("code", "warned", ""),
        lambda: out.error(ema_cli.errors.Locked("failed", "wait")),
        lambda: out.progress(Progress(5, 10, "noted", what="drawn")),
    ]
    for say in says:
        out.progress(Progress(3, 10, what="drawn"))
        say()
    out.end_progress()
    assert terminal.getvalue().count("drawn") == len(says) + 1
    assert [line for line in screen(terminal.getvalue()) if line] == [
        "said",
        "detailed",
        "data",
        "warning: warned [code]",
        "ema-avg: error: failed",
        "hint: wait",
        "noted",
    ]


@pytest.mark.parametrize(
    ("options", "env", "live"),
    [
        ({}, {}, True),
        ({}, {"NO_COLOR": "1"}, True),
        ({"as_json": True}, {}, False),
        ({}, {"TERM": "dumb"}, False),
        ({"quiet": True}, {}, None),
    ],
)
def test_who_sees_which(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, bool],
    env: dict[str, str],
    live: bool | None,
) -> None:
    """A line that changes only where it can; with ``-q`` none at all."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("ema_cli.views.meter.FIRST_DRAWN", 0.0)
    monkeypatch.setattr("ema_cli.views.meter.FIRST_LINE", 0.0)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    out = Out(**options)
    out.progress(Progress(0, 10))
    out.progress(Progress(5, 10))
    told = terminal.getvalue()
    assert told.startswith("\r") if live else "\r" not in told and "\x1b" not in told
    assert ("50 %  5 bytes of 10 bytes" in told) == (live is False)


# ---------------------------------------------------------------------------- what is told of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of ten tasks."""
    values = [{"w": np.full(10000, k, np.float32)} for k in (1, 2, 3)]
    return write_run(tmp_path / "run", values)


def test_events_tell_what_is_worked_on(run: Path, tmp_path: Path) -> None:
    """The checkpoints of a run; of an update of a state those that are new; outputs by name."""
    seen: list[Progress] = []
    ema_cli.average_run(run, tmp_path / "out.safetensors", decay=0.5, on_event=seen.append)
    assert {event.what for event in seen} == {"3 checkpoints, steps 100 to 300"}
    assert [(e.read, e.total) for e in seen] == [(0, 120000), (120000, 120000)]
    seen.clear()
    given = {"state": tmp_path / "state", "decay": 0.5, "on_event": seen.append}
    ema_cli.average_run(run, steps="100:200", **given)
    ema_cli.average_run(run, tmp_path / "other.safetensors", **given)
    assert list(dict.fromkeys(event.what for event in seen)) == [
        "2 checkpoints, steps 100 to 200",
        "1 checkpoint, step 300",
        "writing other.safetensors",
    ]
    seen.clear()
    ema_cli.verify(tmp_path / "out.safetensors", on_event=seen.append)
    assert list(dict.fromkeys(event.what for event in seen)) == [
        "checksums",
        "recomputing 1 block",
    ]
    seen.clear()
    ema_cli.verify(tmp_path / "state", on_event=seen.append)
    assert {event.what for event in seen} == {"checksums"}
    assert seen[0].read == 0 < seen[-1].read == seen[-1].total
    seen.clear()
    rule = [("^", "model/")]
    out = tmp_path / "renamed.safetensors"
    ema_cli.rename(tmp_path / "out.safetensors", out, rule=rule, on_event=seen.append)
    assert {event.what for event in seen} == {"writing renamed.safetensors"}
    assert seen[0].read == 0 < seen[-1].read == seen[-1].total


def test_checkpoints_without_steps_are_counted() -> None:
    """A state of the class knows none."""
    assert checkpoints([None, None]) == "2 checkpoints"
    assert checkpoints([]) == "0 checkpoints"


# ---------------------------------------------------------------------------- whole commands


def test_a_terminal_shows_a_run(run: Path, tmp_path: Path) -> None:
    """What is done, the bar, and in the end nothing of it; the cursor is never hidden."""
    words = ["run", run, "-o", tmp_path / "out.safetensors", "--decay", "0.5", "--workers", "1"]
    with held(tmp_path, words, nth=6, columns=120) as command:
        command.until_stuck()
        command.until("MB/s")
        command.go()
        code, out, err = command.ended()
    assert (code, out.split()[0]) == (0, "written")
    told = COLOR.sub("", err)
    assert re.search(r"\r3 checkpoints, steps 100 to 300  \S+ +50 %  +58.6 KiB of 117.2 KiB ", told)
    assert not any("KiB of 117.2 KiB" in line for line in screen(told))
    assert "\x1b[?25" not in err


@pytest.mark.parametrize(
    ("columns", "env"),
    [
        (20, {}),
        (120, {}),
        (120, {"NO_COLOR": "1"}),
        (80, {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
        (80, {"TERM": "dumb"}),
        (3, {}),
    ],
)
def test_any_terminal_will_do(run: Path, tmp_path: Path, columns: int, env: dict[str, str]) -> None:
    """No line is wider than it, none has what it cannot show."""
    words = ["run", run, "-o", tmp_path / "out.safetensors", "--decay", "0.5"]
    with held(tmp_path, words, columns=columns, env=env) as command:
        code, _, err = command.ended()
    assert code == 0
    drawn = [part for part in re.split(r"[\r\n]+", COLOR.sub("", err)) if part.endswith("\x1b[K")]
    assert bool(drawn) == (env.get("TERM") != "dumb")
    assert all(len(part.removesuffix("\x1b[K")) < columns for part in drawn)
    assert bool(COLORED.search(err)) == (columns >= 80 and not {"NO_COLOR", "TERM"} & set(env))
    assert err.isascii() or "PYTHONIOENCODING" not in env
    assert "\x1b" not in err or "TERM" not in env


def test_a_pipe_gets_lines_even_where_color_is_forced(run: Path, tmp_path: Path) -> None:
    """No escape sequence; rich is not even imported; ``-q`` says nothing."""
    words = ["run", run, "-o", tmp_path / "out.safetensors", "--decay", "0.5", "--workers", "1"]
    patch = "import atexit\natexit.register(lambda: print('rich' in sys.modules))"
    with held(tmp_path, words, env={"FORCE_COLOR": "1"}, patch=patch) as command:
        code, out, err = command.ended()
    assert (code, out.splitlines()[-1]) == (0, "False")
    assert "\x1b" not in err
    assert re.findall(r"^(\d+) %  \S+ KiB of 117.2 KiB  ", err, re.MULTILINE) == [
        str(k) for k in range(10, 101, 10)
    ]
    with held(tmp_path, [*words, "--overwrite", "-q"]) as command:
        assert command.ended()[2] == ""


def test_with_v_the_files_are_told(run: Path, tmp_path: Path) -> None:
    """Each file that is read, with its size, before the work."""
    words = ["run", run, "-o", tmp_path / "out.safetensors", "--decay", "0.5"]
    assert "reads: " not in cmd(*words, "--dry-run").err
    err = cmd(*words, "-v").err
    files = re.findall(r"^reads: .*/model-step-(\d+)\.safetensors, 39.1 KiB$", err, re.MULTILINE)
    assert files == ["100", "200", "300"]

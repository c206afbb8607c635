"""Ctrl-C once and twice, SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import Outcome, cmd
from terminal import Held, held, run_of_ten_tasks, screen, words

from ema_cli import __main__, engine
from ema_cli.cli import main, signals
from ema_cli.cli.signals import Signals, Terminated
from ema_cli.executing import executor_of

FIRST = "interrupted: finishing what is running; Ctrl-C again stops at once"
HINT = "hint: the same command continues; --restart starts over"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of ten tasks."""
    return run_of_ten_tasks(tmp_path / "run")


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> bytes:
    """What comes out of it."""
    path = tmp_path / "expected.safetensors"
    cmd("run", run, "-o", path, "--decay", "0.5")
    return path.read_bytes()


def again(run: Path, *more: str | Path) -> tuple[Outcome, bytes]:
    """Give the same command again; returns what it said and made."""
    with held(run.parent, words(run, *more)) as command:
        outcome = Outcome(*command.ended())
    place = run.parent / "place"
    assert {path.name for path in place.iterdir()} == {
        "out.safetensors",
        "out.safetensors.ema.json",
    }
    return outcome, (place / "out.safetensors").read_bytes()


def left(run: Path) -> set[str]:
    """What a command left beside its output."""
    return {path.name for path in (run.parent / "place").iterdir()}


@contextmanager
def stuck(run: Path, *more: str | Path, columns: int = 0) -> Iterator[Held]:
    """A run whose fourth task does not end."""
    with held(run.parent, words(run, *more), nth=4, columns=columns) as command:
        command.until_stuck()
        yield command


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_finishes_what_is_running(
    run: Path, expected: bytes, number: signal.Signals, code: int
) -> None:
    """It says so while the task still runs; what is done is recorded, the rest is for another."""
    with stuck(run) as command:
        command.process.send_signal(number)
        assert command.process.stderr is not None
        assert "finishing what is running" in _line(command, "finishing")
        assert command.process.poll() is None
        command.go()
        found, out, err = command.ended()
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == HINT
    assert "out.safetensors" not in left(run)
    outcome, made = again(run)
    # That which was handed over in the very moment too.
    assert re.search(r"resuming: [45] of 10 ranges done", outcome.err)
    assert made == expected


def _line(command: Held, text: str) -> str:
    """Return the next line on stderr that holds a text."""
    assert command.process.stderr is not None
    return next(line for line in command.process.stderr if text in line)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_it_at_once(
    run: Path, expected: bytes, number: signal.Signals, code: int
) -> None:
    """Though the task never ends; nothing has a final name, and the same command does its work."""
    with stuck(run) as command:
        command.process.send_signal(number)
        _line(command, "finishing")
        time.sleep(signals.TOGETHER)
        command.process.send_signal(number)
        found, _, err = command.ended()
    assert found == code
    assert err == "stopped at once\n"
    assert all(name.startswith(".") for name in left(run))
    assert again(run)[1] == expected


@pytest.mark.parametrize("second", [False, True])
def test_ctrl_c_on_a_terminal(run: Path, expected: bytes, second: bool) -> None:
    """The key itself: each line stands alone, no progress is left, the cursor is there."""
    with stuck(run, columns=120) as command:
        command.until("MB/s")
        command.press(b"\x03")
        command.until(FIRST)
        if second:
            time.sleep(signals.TOGETHER)
            command.press(b"\x03")
        else:
            command.go()
        code, _, err = command.ended()
    assert code == 130
    shown = [line for line in screen(err) if line]
    shown = shown[shown.index(FIRST) :]  # before it come pictures
    told = ["ema-avg: error: interrupted; nothing half-written was published", HINT]
    assert shown == [FIRST, *(["stopped at once"] if second else told)]
    assert "\x1b[?25l" not in err
    assert again(run)[1] == expected


def test_with_q_only_the_error_is_told(run: Path) -> None:
    """The first signal says nothing by itself."""
    with stuck(run, "-q") as command:
        command.process.send_signal(signal.SIGINT)
        command.go()
        code, _, err = command.ended()
    assert code == 130
    assert err.splitlines()[0] == "ema-avg: error: interrupted; nothing half-written was published"


def test_a_signal_that_comes_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever started us may pass on what the terminal sent to both."""
    said: list[str] = []
    now = 5.0
    ended: list[int] = []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGTERM)
    with Signals(said.append):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        now += signals.TOGETHER / 2
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert said == [FIRST]
        now += signals.TOGETHER
        with pytest.raises(Terminated):  # only since the process goes on here
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]
    assert said[1] == "stopped at once"
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_started_us_may_have_it_ignored(run: Path) -> None:
    """As a shell does for what is in the background; and `main` may run in any thread."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals(print):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    codes: list[int] = []
    given = list(map(str, words(run)))
    thread = threading.Thread(target=lambda: codes.append(main(given)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_what_waits_for_a_thread_is_not_begun() -> None:
    """Checksums of a whole output may be waiting."""
    started, go, begun = threading.Event(), threading.Event(), []

    def work(number: int) -> None:
        begun.append(number)
        started.set()
        go.wait(60)

    threading.Timer(0.05, go.set).start()
    with pytest.raises(KeyboardInterrupt), executor_of(None, 1) as pool:
        for number in range(100):
            pool.submit(work, number)
        started.wait(60)
        raise KeyboardInterrupt
    assert begun == [0]


def test_what_was_cancelled_is_not_waited_for() -> None:
    """Results may be given up when the threads have gone."""
    with pytest.raises(KeyboardInterrupt), executor_of(None, 1) as pool:
        results = engine.bounded(pool, time.sleep, enumerate([0.01] * 9), 9, lambda *_: None)
        next(results)
        raise KeyboardInterrupt
    closing = threading.Thread(target=results.close, daemon=True)  # type: ignore[attr-defined]
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


@pytest.mark.parametrize("command", ["plan", "verify", "export"])
def test_what_writes_nothing_has_nothing_half_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """One who only looks is not told of outputs."""

    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for place in ("ema_cli.api.plan_run", "ema_cli.verification.auditing.verify"):
        monkeypatch.setattr(place, interrupt)
    monkeypatch.setattr("ema_cli.api.export", interrupt)
    more = ["-o", run.parent / "out"] if command == "export" else []
    err = cmd(command, run, *more, code=130).err
    assert err.startswith("ema-avg: error: interrupted")
    assert ("nothing half-written" in err) == (command == "export")


def test_while_the_command_is_loaded_ctrl_c_ends_it_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the command's own handler stands, the interpreter's would show a traceback."""
    seen: list[object] = []
    monkeypatch.setattr("ema_cli.cli.entry", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        __main__.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_DFL]

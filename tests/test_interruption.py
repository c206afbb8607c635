"""Signals that arrive while the threading library holds a lock wait until it does not."""

from __future__ import annotations

import threading

import pytest

from ema_cli.interruption import held, interrupt


def test_outside_it_is_raised_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(KeyboardInterrupt)


def test_inside_it_waits_for_the_end_of_the_outermost_context() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), held():
        with held():
            interrupt(KeyboardInterrupt)
            seen.append("inner")
        seen.append("outer")
    assert seen == ["inner", "outer"]
    with held():
        pass  # it was raised once


def test_an_error_on_its_way_is_the_context_of_the_signal() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, held():
        interrupt(KeyboardInterrupt)
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_another_thread_holds_nothing_up() -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with held():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(KeyboardInterrupt):
        interrupt(KeyboardInterrupt)
    done.set()
    thread.join()

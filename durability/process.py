"""Commands in processes of their own, forked from one that has everything imported.

Two thirds of the time of a short command is the start of Python and NumPy. A fork has that behind
it, and makes no system calls of the interpreter's own; strace attaches to it before it begins.

The threads of the tool's pool are replaced by calls in turn, so that the n-th call of a name is the
same one in every run: strace counts calls per thread. Races and random kills use the real threads.
"""

from __future__ import annotations

import concurrent.futures
import faulthandler
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ema_cli.progress import Log
    from ema_cli.tasks import Done

PATIENCE = 30.0  # seconds after which a command hangs
HUNG = 1000


class InTurn(Executor):
    """An executor that carries out what it is given at once, in the calling thread."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` and return its finished future."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


# Elements in a task: the tiny run is cut into as many tasks as a large one.
TASK_ELEMENTS = 5000


def warm_up() -> None:
    """Import the tool, its threads replaced and its measures those of a tiny run."""
    concurrent.futures.ThreadPoolExecutor = InTurn  # type: ignore[assignment,misc]
    import ema_cli.cli  # noqa: F401  # for the forks
    from ema_cli import engine, progress
    from ema_cli.live import readiness, watching

    engine.TASK_ELEMENTS = TASK_ELEMENTS
    readiness.QUIET_SECONDS = watching.SHORTEST_INTERVAL = 0.0
    setattr(progress.Log, "add", _record_some)  # noqa: B010  # a function for a method


class _Once:
    """What the log's thread waits for: that it is told once to go on, then to stop."""

    def __init__(self) -> None:
        self._answers = [True, False]

    def wait(self, _: float) -> bool:
        """Return whether to stop."""
        return self._answers.pop()


def _record_some(log: Log, ordinal: int, done: Done) -> None:
    """Record the first tasks two by two, at once, as the log's thread does every two seconds."""
    log._raise()
    log._pending.append((ordinal, done))
    added = log.__dict__["added"] = log.__dict__.get("added", 0) + 1
    if added in (2, 4):
        stopping, log._stopping = log._stopping, _Once()  # type: ignore[assignment]
        log._added.set()
        try:
            log._keep()
        finally:
            log._stopping = stopping


def rehearse(argv: Sequence[str], cwd: str) -> None:
    """Run the tool in this process, so that forks find imported what it imports on the way."""
    from ema_cli.cli import main

    sys.stdout.flush()
    sys.stderr.flush()
    before, kept = os.getcwd(), (os.dup(1), os.dup(2))
    sink = os.memfd_create("sink")
    try:
        os.chdir(cwd)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        code = main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os.chdir(before)
        for fd, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, fd)
            os.close(copy)
    said = _text(sink)
    os.close(sink)
    if code != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit {code}: {said}")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that killed it, and what it said."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> str:
        """One line for a report."""
        lines = self.err.strip().splitlines()
        last, how = lines[-3:], f"exit {self.code}"
        if self.code == -HUNG:
            frames = [k for k, line in enumerate(lines) if line.startswith("Current thread")]
            last, how = lines[frames[-1] if frames else 0 :][:12], "hung"
        return f"{how}: {' | '.join(last)}"


class Running:
    """A command that was started.

    Attributes:
        pid: of its process.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: str,
        trace: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> None:
        self._out, self._err = os.memfd_create("out"), os.memfd_create("err")
        gate, release = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(argv, cwd, (self._out, self._err, gate), before)
        os.close(gate)
        self._tracer = _attach(self.pid, trace) if trace else None
        os.close(release)

    def wait(self) -> Ended:
        """Return how it ended."""
        code = _wait(self.pid)
        if self._tracer is not None:
            self._tracer.communicate()
        ended = Ended(code, _text(self._out), _text(self._err))
        os.close(self._out)
        os.close(self._err)
        return ended


def start(argv: Sequence[str], cwd: str, trace: Sequence[str] = ()) -> Running:
    """Start the tool with `argv` in a fork; `trace` are arguments of strace, if it shall attach."""
    return Running(argv, cwd, trace)


def run(
    argv: Sequence[str],
    cwd: str,
    *,
    trace: Sequence[str] = (),
    before: Callable[[], None] | None = None,
) -> Ended:
    """Run the tool to its end, as `start`; `before` is called in the child first."""
    return Running(argv, cwd, trace, before).wait()


def _child(
    argv: Sequence[str],
    cwd: str,
    fds: tuple[int, int, int],
    before: Callable[[], None] | None,
) -> None:
    """Be the tool; never returns. It begins when nobody holds the gate's other end any more."""
    out, err, gate = fds
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(cwd)
        os.closerange(3, gate)
        os.closerange(gate + 1, 1024)
        os.read(gate, 1)
        os.close(gate)
        faulthandler.register(signal.SIGUSR1)
        from ema_cli.cli import main

        if before is not None:
            before()
        code = main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _attach(pid: int, trace: Sequence[str]) -> subprocess.Popen[bytes]:
    """Return strace, attached to `pid`.

    It says so when the process is bound to stop before its next system call, not earlier: without
    waiting for that, the first calls would not be counted.
    """
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), *trace],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if not said.rstrip().endswith(b" attached"):
        os.kill(pid, signal.SIGKILL)
        _, more = tracer.communicate()
        raise RuntimeError(f"strace could not attach: {(said + more).decode(errors='replace')}")
    return tracer


def _wait(pid: int) -> int:
    """Return the exit code of a child; one that hangs is killed."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        hung = not poll.poll(PATIENCE * 1000)
        if hung:
            os.kill(pid, signal.SIGUSR1)  # says where it hangs
            poll.poll(500)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(fd)
    return -HUNG if hung else os.waitstatus_to_exitcode(status)


def _text(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        return file.read().decode(errors="replace")

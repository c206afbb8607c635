"""Runs commands on hostile files, in processes of their own that are watched and limited.

A program: reads jobs as JSON from its standard input and writes a report of each, a line of JSON.
Everything that a sound file needs is imported once; a fork then does one job after the other, as
long as it lives. What ends it, or keeps it busy for too long, is the fault of the job at hand.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from canaries import Canaries
from watch import Watch

from ema_cli.cli import main
from ema_cli.formats import torch

ADDRESSES = 3 << 30  # bytes of address space: NumPy and its threads take one of them
PATIENCE = 60.0  # seconds: nothing of this takes long, and what takes longer never ends

Job = dict[str, Any]


def listing(folder: str) -> dict[str, tuple[int, int]]:
    """Return size and time of every file below a folder."""
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "canary"]  # whose touching is noticed
        for name in (*names, *folders):
            status = os.lstat(os.path.join(root, name))
            here = os.path.relpath(os.path.join(root, name), folder)
            found[here] = (0, 0) if name in folders else (status.st_size, status.st_mtime_ns)
    return found


def peak(pid: int | str) -> int:
    """Return the most memory a process had since `forget_peak`, in KiB."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


def forget_peak(pid: int | str) -> None:
    """Let the most memory a process had be what it has."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def children() -> list[str]:
    """Return the processes this one has started and that still run."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return file.read().split()
    except OSError:
        return []


def commanded(words: Sequence[str]) -> Job:
    """Run one command and return what it did."""
    out, err = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    seconds = time.monotonic() - begun
    return {"code": code, "out": out.getvalue()[:4000], "err": err.getvalue(), "seconds": seconds}


def naughty(canary: str) -> Job:
    """Return as a command would, after having done everything that is forbidden."""
    for deed in (
        lambda: exec("1 + 1"),
        lambda: __import__("antigravity_of_nobody"),
        lambda: os.system("true"),
        lambda: open(os.path.join(canary, "secret.bin"), "rb").close(),
        lambda: open(os.path.join(canary, "pwned"), "wb").close(),
        lambda: open("/etc/hostname").close(),
        lambda: __import__("socket").socket().close(),
        lambda: os.listdir("/"),
    ):
        with contextlib.suppress(Exception):
            deed()
    return {"code": 0, "out": "", "err": "", "seconds": 0.0}


class Fork:
    """The process that does jobs; `off` while it does anything else."""

    def __init__(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.hook = Watch([])
        self.hook.off = True
        sys.addaudithook(self.hook)

    def serve(self, jobs: Sequence[Job], report: int) -> None:
        """Do all the jobs."""
        with os.fdopen(report, "w") as file:
            for job in jobs:
                file.write(json.dumps(self.serve_one(job)) + "\n")
                file.flush()

    def serve_one(self, job: Job) -> Job:
        """Do a job and return everything that is to be known of it."""
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        self.hook.places[:] = Watch(job["places"]).places
        self.hook.seen.clear()
        known, waited = set(sys.modules), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        for pid in ("self", *children()):
            forget_peak(pid)
        canaries = Canaries([job["canary"], *job["canaries"]])
        before = listing(job["folder"])
        self.hook.off = False
        done = [commanded(words) if words else naughty(job["canary"]) for words in job["commands"]]
        self.hook.off = True
        touched, after = canaries.close(), listing(job["folder"])
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        ended = most if most > waited else 0
        return {
            "name": job["name"],
            "done": done,
            "peak": peak("self"),
            "helper": max(ended, *(peak(pid) for pid in children()), 0),
            "events": sorted(self.hook.seen),
            "modules": sorted(set(sys.modules) - known),
            "touched": touched,
            "changed": sorted(k for k in {*before, *after} if before.get(k) != after.get(k)),
            "end": "",
        }


def forked(jobs: Sequence[Job]) -> list[Job]:
    """Do jobs in a process of its own; the last of the reports is that of the one that ended it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            os.setsid()
            Fork().serve(jobs, writing)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
        finally:
            os._exit(0)
    os.close(writing)
    reports, hung = _answers(reading, len(jobs))
    if hung:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if len(reports) < len(jobs):
        nothing = {
            "done": [],
            "peak": 0,
            "helper": 0,
            "events": [],
            "modules": [],
            "touched": [],
            "changed": [],
        }
        end = "it took too long" if hung else f"the process ended with status {status}"
        reports.append({"name": jobs[len(reports)]["name"], **nothing, "end": end})
    return reports


def _answers(reading: int, count: int) -> tuple[list[Job], bool]:
    """Return what a process has to report of its jobs, and whether one of them took too long."""
    told: list[bytes] = [b""]
    end = time.monotonic() + PATIENCE
    with os.fdopen(reading, "rb", buffering=0) as file:
        while len(told) <= count:
            ready, _, _ = select.select([file], [], [], max(0, end - time.monotonic()))
            piece = file.read(1 << 20) if ready else b""
            if not piece:
                return [json.loads(line) for line in told[:-1]], not ready
            lines = (told.pop() + piece).split(b"\n")
            end = time.monotonic() + PATIENCE if len(lines) > 1 else end
            told += lines
    return [json.loads(line) for line in told[:-1]], False


def imported(names: Sequence[str]) -> None:
    """Import what a sound file needed, so that it is there for all others."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run(jobs: list[Job]) -> None:
    """Do all jobs, those on sound files first and alone."""
    sound = [job for job in jobs if job["sound"]]
    jobs = jobs[len(sound) :]
    for job in sound:
        [report] = forked([job])
        imported(report["modules"])
        print(json.dumps(report))
    while jobs:
        reports = forked(jobs)
        for report in reports:
            print(json.dumps(report))
        jobs = jobs[len(reports) :]


if __name__ == "__main__":
    "\x1b".encode("unicode_escape")  # the codec is a module, which any odd name may import
    # A file of any name may turn out to be a pickle: what reads one is ours, and no attack.
    imported(
        [found.name for found in pkgutil.walk_packages(torch.__path__, "ema_cli.formats.torch.")]
    )
    run([json.loads(line) for line in sys.stdin])

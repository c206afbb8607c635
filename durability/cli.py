"""The command line of the fault injection."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import time
import traceback

from durability import pool
from durability.pool import Report, Wanted

HARNESSES = (
    *("kill", "powercut", "explore", "mutate", "errors", "full"),
    *("memory", "race", "sources", "bits"),
)
NEEDED = {"strace": "strace", "mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mount": "mount"}
QUICK = 20
SHOWN = int(os.environ.get("SHOWN", "20"))


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m durability",
        description="Inject faults into ema-avg, everywhere, and check what it promises.",
        epilog="Exit code 1 when anything failed, with the command that shows it again.",
    )
    options.add_argument("harness", nargs="*", metavar="|".join(HARNESSES))
    options.add_argument("--quick", action="store_true", help=f"{QUICK} points of each")
    options.add_argument("--full", action="store_true", help="every point, however long it takes")
    options.add_argument("--points", "--states", type=int, metavar="N", help="at most N of each")
    options.add_argument("--only", default="", metavar="LABEL", help="just this point")
    options.add_argument("--seed", type=int, default=1, help="for what is chosen at random")
    return options


def check_machine() -> None:
    """Refuse a machine on which faults cannot be injected: nothing is ever skipped."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = sorted({p for tool, p in NEEDED.items() if shutil.which(tool, path=path) is None})
    if missing:
        raise SystemExit(f"missing: apt-get install {' '.join(missing)}")
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise SystemExit("power cuts and full disks need Linux and root")


def run_one(name: str, wanted: Wanted) -> Report:
    """Run one harness; one that cannot do its work has failed."""
    began = time.monotonic()
    try:
        report: Report = importlib.import_module(f"durability.{name}").run(wanted)
    except Exception:
        report = Report(name, "did not run", [traceback.format_exc()])
    report.seconds = time.monotonic() - began
    return report


def show(report: Report) -> None:
    """Print what a harness found."""
    print(f"{report.name}: {report.line} ({report.seconds:.0f} s)", flush=True)
    for failure in report.failures[:SHOWN]:
        print(f"  FAILED {failure}", flush=True)
    if len(report.failures) > SHOWN:
        print(f"  and {len(report.failures) - SHOWN} more", flush=True)


def main() -> int:
    """Be ``python -m durability``; returns the exit code."""
    signal.signal(signal.SIGTERM, pool.stop)
    try:
        return _main()
    except KeyboardInterrupt:
        print("durability: interrupted")
        return 130


def _main() -> int:
    """Run the harnesses that were asked for, or all."""
    options = parser().parse_args()
    unknown = set(options.harness) - set(HARNESSES)
    if unknown:
        raise SystemExit(f"no harness {min(unknown)!r}: there are {', '.join(HARNESSES)}")
    check_machine()
    points = QUICK if options.quick else options.points
    wanted = Wanted(points, options.full, options.only, options.seed)
    began = time.monotonic()
    failed = []
    for name in options.harness or HARNESSES:
        report = run_one(name, wanted)
        show(report)
        if report.failures:
            failed.append(name)
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all good"
    print(f"durability: {verdict} ({time.monotonic() - began:.0f} s)")
    return int(bool(failed))

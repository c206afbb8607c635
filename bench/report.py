"""Puts the numbers into a table for people and a document for programs."""

import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.budgets import Verdict, ratio
from bench.contestants import LIMIT, OPEN, OVERLAPPED, Group
from bench.measure import Score, best_variants
from bench.peer import torch_peer

PACKAGES = ("ema-avg", "numpy", "click", "safetensors", "ml_dtypes", "h5py")
# Above this, something else takes time away from the contestants.
BUSY_CORES = 0.2
HEAD = ("contestant", "best s", "median s", "GB/s", "peak MiB", "ratio", "note")


def version(package: str) -> str:
    """Return the version of a package without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def processor() -> str:
    """Return the name of the processor as Linux gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def processor_ticks() -> tuple[int, int]:
    """Return the idle and the total time of all cores since the machine started."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    ticks = [int(word) for word in line.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def busy_cores() -> float:
    """Return how many cores something else uses; load averages would count our last run."""
    idle, total = processor_ticks()
    time.sleep(1)
    idle_after, total_after = processor_ticks()
    share = 1 - (idle_after - idle) / max(total_after - total, 1)
    return share * (os.cpu_count() or 1)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on, among it what else was running; takes a second."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    peer = torch_peer()
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "busy_cores_before": round(busy_cores(), 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "torch": peer.version if peer else "absent",
    }


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Align columns: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def note(score: Score) -> str:
    """Return what else is worth knowing about a contestant."""
    if score.error:
        return "FAILED"
    best = score.best
    if score.contestant.role == OPEN:
        return f"in process, process {best.wall:.3f}"
    if best.fsync is None:
        return ""
    return f"{score.contestant.variant} blocks, fsync {best.fsync:.3f}, process {best.wall:.3f}"


def own_ratio(scores: list[Score], score: Score) -> float | None:
    """Return a contestant's time as a multiple of the plain limit over the same data."""
    contestant = score.contestant
    names = {
        s.contestant.name: s.best_seconds
        for s in best_variants(scores)
        if s.contestant.role == LIMIT and s.contestant.data_set == contestant.data_set
    }
    if not names or not score.samples:
        return None
    name, least = names.popitem()
    if contestant.role in (LIMIT, OVERLAPPED):
        return score.best.seconds / least
    return ratio(scores, contestant.name, name)


def cells(scores: list[Score], score: Score) -> tuple[str, ...]:
    """Return one line of the table."""
    name = score.contestant.name
    if not score.samples:
        return (name, "-", "-", "-", "-", "-", note(score))
    best, inputs, factor = score.best, score.contestant.data_set, own_ratio(scores, score)
    rate = f"{inputs.input_bytes / best.seconds / 1e9:.2f}" if inputs else "-"
    return (
        name,
        f"{best.seconds:.3f}",
        f"{score.median:.3f}",
        rate,
        f"{score.peak_mib:.0f}",
        "-" if factor is None else f"{factor:.2f}",
        note(score),
    )


def group_table(group: Group, scores: list[Score]) -> str:
    """Return the table of one group."""
    rows = [HEAD, *(cells(scores, score) for score in best_variants(scores))]
    return "\n".join([group.title, *(f"  {line}" for line in aligned(rows, left=(0, 6)))])


def budget_table(found: Sequence[Verdict]) -> str:
    """Return the budgets, each with what was measured."""
    rows = [("budget", "measured", "at most", "", "")]
    for verdict in found:
        measured = "-" if verdict.measured is None else f"{verdict.measured:.2f}"
        most = "-" if verdict.budget is None else f"{verdict.budget:.2f}"
        rows.append((verdict.label, measured, most, verdict.unit, verdict.text))
    return "\n".join(aligned(rows, left=(0, 3, 4)))


def machine_text(facts: dict[str, Any]) -> str:
    """Return the machine for people, and a warning when it was not idle."""
    text = ", ".join(f"{key} {value}" for key, value in facts.items())
    if facts["busy_cores_before"] < BUSY_CORES:
        return text
    return f"{text}\nThe machine was busy before the first round: repeat this on an idle one."


def score_document(group: Group, score: Score) -> dict[str, Any]:
    """Return one contestant as plain data."""
    contestant = score.contestant
    inputs = contestant.data_set
    return {
        "group": group.key,
        "name": contestant.name,
        "variant": contestant.variant,
        "input_bytes": inputs.input_bytes if inputs else None,
        "samples": [vars(sample) for sample in score.samples],
        "error": score.error or None,
    }


def document(
    facts: dict[str, Any],
    groups: Sequence[tuple[Group, list[Score]]],
    found: Sequence[Verdict],
    rounds: int,
) -> dict[str, Any]:
    """Return everything as plain data for ``--json``."""
    return {
        "schema": 1,
        "machine": facts,
        "rounds": rounds,
        "contestants": [score_document(g, score) for g, scores in groups for score in scores],
        "budgets": [{**vars(verdict), "verdict": verdict.text} for verdict in found],
    }

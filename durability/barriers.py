"""The names of the barriers: every fsync of a recorded run, by what it makes durable and when."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from durability.scenario import STATE
from durability.simulate import Link, Operation, Rename, Sync

# What each barrier is for: leaving it out loses something, and the explorer must notice.
NECESSARY = {
    "parent": "the name of a new state's directory",
    "FORMAT.file": "what says that the directory is a state",
    "FORMAT.dir": "its name, before the name of anything else that would not belong there",
    "plan.file": "settings, which ROOT tells of",
    "slot.data": "the new generation of shadows",
    "ledger.data": "which checkpoints they consist of",
    "last.file": "the structure of the last checkpoint",
    "last.dir": "the names of its files",
    "manifest.file": "the checksums of the slot",
    "state.dir before ROOT": "the names of all of these",
    "ROOT.file": "the commit point",
    "ROOT.dir": "its name, before the update is acknowledged",
    "output.file": "an output, before it has its final name",
    "provenance.file": "its provenance, likewise",
    "output.dir": "their names, before the output is acknowledged",
}
# These only save work, or repeat what another one does.
OPTIONAL = {
    "plan.dir": "the directory is synced again before ROOT tells of the plan",
    "progress.group": "what a record tells of is read back and compared before it is believed",
    "progress.data": "a lost or torn record only costs the work it tells of",
    "progress.dir": "likewise",
}


def named(operations: Sequence[Operation]) -> dict[int, str]:
    """Return the name of the barrier at each position that is one."""
    found: dict[int, str] = {}
    latest = ""  # name given in the state's directory
    before = -1  # the last barrier
    for position, operation in enumerate(operations):
        if isinstance(operation, Rename | Link) and not operation.name.startswith("slot."):
            latest = operation.name
        if isinstance(operation, Sync):
            found[position] = _name(operation.path, latest)
            if found[position] == "progress.data":
                found[before] = "progress.group"  # what it tells of was made durable for it
            before = position
    return found


def _name(path: str, latest: str) -> str:
    head, name = os.path.split(path)
    if path in ("", "."):
        if "progress" in latest:
            return "progress.dir"
        return "parent" if latest == STATE else "output.dir"
    if "progress" in name:
        return "progress.data"
    if path == STATE:
        known = {"FORMAT": "FORMAT.dir", "plan": "plan.dir", "ROOT": "ROOT.dir"}
        if "progress" in latest:
            return "progress.dir"
        return known.get(latest, "state.dir before ROOT")
    if head == "":
        return "provenance.file" if ".ema.json" in name else "output.file"
    if head == STATE and re.fullmatch(r"last-\d+", name):
        return "last.dir"
    if re.match(rf"{STATE}/last-\d+", head):
        return "last.file"
    kind = re.sub(r"[-.]\d+", "", name.removesuffix(".tmp"))
    return f"{kind}.data" if kind in ("slot", "ledger") else f"{kind}.file"

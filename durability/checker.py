"""What must hold after any fault: nothing acknowledged is lost, nothing else is in the state."""

from __future__ import annotations

import os

from durability import reader
from durability.process import Ended
from durability.reader import Damage
from durability.scenario import (
    LAST,
    STATE,
    STEP,
    Scenario,
    Step,
    acknowledged,
    digest,
)

FINAL = Step("final", ("export", STATE, "-o", "final.safetensors"), output="final.safetensors")
VERIFY = Step("verify", ("verify", STATE))


class Wrong(Exception):
    """A promise was broken."""


def consumed(scenario: Scenario, directory: str) -> int:
    """Return how many checkpoints are in a state, every byte of which is checked.

    Raises `Wrong` when it is damaged, or holds anything but what an undisturbed run would.
    """
    try:
        facts = reader.check(directory)
    except (Damage, LookupError, ValueError, TypeError) as error:
        raise Wrong(f"the state is damaged: {error}") from error
    if facts is None:
        return 0
    n = len(facts.applied)
    if facts.applied != tuple(k * STEP for k in range(1, n + 1)) or facts.missed:
        raise Wrong(f"the ledger holds {facts.applied} and missed {facts.missed}")
    if facts.contents != scenario.reference.contents[n]:
        raise Wrong(f"other bits than an undisturbed run has after {n} checkpoints")
    return n


def check_state(
    scenario: Scenario, step: Step, workspace: str, out: str, *, partly: bool = False
) -> int:
    """Check the state a fault left during `step`, which had printed `out`; returns its count.

    `partly`: a checkpoint could not be used, so that the update may end before it.
    """
    n = consumed(scenario, os.path.join(workspace, STATE))
    promised = max(step.before, acknowledged(out))
    if n < promised:
        raise Wrong(f"lost: {promised} checkpoints were acknowledged, the state holds {n}")
    if n not in (range(step.before, step.after + 1) if partly else (step.before, step.after)):
        raise Wrong(f"half a batch: {n} checkpoints")
    return n


def check_output(scenario: Scenario, step: Step, workspace: str, out: str) -> None:
    """Check that nothing half-written has the name of the output of a step."""
    if not step.output:
        return
    path = os.path.join(workspace, step.output)
    if not os.path.exists(path):
        if f"{step.output}\n" in out and "written" in out:
            raise Wrong("lost: the output was acknowledged and is not there")
        return
    if digest(path) != scenario.reference.outputs[step.equals]:
        raise Wrong("the output under its final name has other bytes")


def check_rerun(scenario: Scenario, step: Step, workspace: str, *, continued: bool = True) -> bool:
    """Give the command again: everything must be as if undisturbed.

    `continued`: then one more checkpoint, the tool's own verification, and an export. Returns
    whether it went on where the first one had got to.
    """
    again = scenario.run(step, workspace)
    if again.code != 0:
        raise Wrong(f"the same command again: {again.summary}")
    if step.output:
        path = os.path.join(workspace, step.output)
        if not os.path.exists(path):
            raise Wrong("the same command again wrote no output")
        if digest(path) != scenario.reference.outputs[step.equals]:
            raise Wrong("the same command again wrote other bytes")
    left = sorted(name for name in os.listdir(workspace) if name.startswith(f".{step.output}."))
    if step.output and left:
        raise Wrong(f"the same command again left {left} behind")
    if STATE in scenario.argv(step):
        if consumed(scenario, os.path.join(workspace, STATE)) != step.after:
            raise Wrong("the same command again did not bring the state where it should be")
        if continued:
            _check_continued(scenario, workspace)
    return "resuming: " in again.err


def _check_continued(scenario: Scenario, workspace: str) -> None:
    state = os.path.join(workspace, STATE)
    for more in (LAST, VERIFY, FINAL):
        ended = scenario.run(more, workspace)
        if ended.code != 0:
            raise Wrong(f"{more.name} after the same command again: {ended.summary}")
    if consumed(scenario, state) != LAST.after:
        raise Wrong("one more checkpoint did not get into the state")
    reference = scenario.reference.outputs
    found = digest(os.path.join(workspace, FINAL.output))
    if reference.setdefault(LAST.after, found) != found:
        raise Wrong("the last export has other bytes")


def check_error(ended: Ended, allowed: set[int]) -> None:
    """Check that a command failed as documented: a known exit code, one line, no traceback."""
    if ended.code < 0:
        raise Wrong(f"ended by a signal, or hung: {ended.summary}")
    if "Traceback" in ended.err or ended.code not in allowed:
        raise Wrong(ended.summary)
    said = [line for line in ended.err.splitlines() if line.startswith("ema-avg: error: ")]
    if (ended.code in (0, 3)) != (not said) or len(said) > 1:
        raise Wrong(f"expected one line that begins with error, {ended.summary}")


def check_everything(scenario: Scenario, step: Step, workspace: str, ended: Ended) -> bool:
    """Check what a fault left, then that the same command again makes it good, as `check_rerun`."""
    if STATE in scenario.argv(step):
        check_state(scenario, step, workspace, ended.out)
    check_output(scenario, step, workspace, ended.out)
    return check_rerun(scenario, step, workspace)

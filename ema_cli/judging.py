"""What is made of distances: a part of the provenance, warnings, or an error in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli import distances as measures
from ema_cli import errors, omitting, outliers, provenance
from ema_cli.distances import Distances
from ema_cli.measuring import Measured
from ema_cli.plan import Outcome, Plan
from ema_cli.text import shorten
from ema_cli.warnings import PlanWarning

CHOICES = ("warn", "error")


class Suspect(NamedTuple):
    """A checkpoint that does not seem to belong to its run.

    Attributes:
        average: the label of the one that tells.
        step: of the checkpoint.
        path: of the checkpoint.
        group: of tensors, in which it is farthest from the average; empty for a duplicate.
        ratio: how many times as far as its neighbours; for a duplicate, as the one before.
        kind: ``far``, or ``duplicate``: it holds the values of the one before.
    """

    average: str
    step: int | None
    path: str
    group: str
    ratio: float
    kind: str


class Judge:
    """What is known of the distances of a plan's checkpoints, and what to do about outliers.

    Args:
        plan: of all averages.
        refuse: raise `errors.Outlier` where there is one.
    """

    def __init__(self, plan: Plan, *, refuse: bool) -> None:
        self._plan = plan
        self._refuse = refuse
        self.distances: dict[str, Distances] = {}
        self.notes: list[str] = []
        self._outliers: dict[str, list[outliers.Outlier]] = {}

    def look_up(self, outcomes: Sequence[Outcome]) -> None:
        """Take the distances of outputs that are there already from their provenance.

        Raises `errors.OutputExists` where outliers are refused and it holds none.
        """
        for outcome in outcomes:
            path = outcome.layout.path
            document: Mapping[str, Any] = provenance.load(path) or {}
            steps = [checkpoint.step for checkpoint in self._plan.run.checkpoints]
            found = document.get("distances")
            known = measures.from_json(found, outcome.average.label, steps)
            if known is None and self._refuse:
                raise errors.OutputExists(
                    f"{shorten(path, 1000)}: exists already, and its provenance holds no distances "
                    "to judge its checkpoints by",
                    "measure them with --overwrite",
                )
            if known is None:
                self.notes.append(
                    f"{shorten(path, 1000)}: its provenance holds no distances; "
                    "--overwrite measures them"
                )
            else:
                self.distances[path] = known

    def judge(self, plan: Plan, measured: Measured) -> list[dict[str, Any]]:
        """Return what the provenance of each of a plan's outputs says of what was measured.

        Raises `errors.Outlier` where outliers are refused.
        """
        found = []
        for outcome in plan.outcomes:
            label = outcome.average.label
            one = measured.distances(plan.work, outcome.schedule, label)
            self.distances[outcome.layout.path] = one
            found.append({"distances": one.to_json()})
        self.check()
        return found

    def check(self) -> None:
        """Raise `errors.Outlier` where outliers are refused and there is one."""
        told = self.warnings(again=False) if self._refuse else []
        if told:
            more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
            raise errors.Outlier(told[0].message + more, told[0].hint)

    def suspects(self) -> list[Suspect]:
        """Return the outliers of all averages that are known."""
        checkpoints = self._plan.run.checkpoints
        return [
            Suspect(
                outcome.average.label,
                checkpoints[one.checkpoint].step,
                checkpoints[one.checkpoint].path,
                one.group,
                one.ratio,
                one.kind,
            )
            for outcome in self._plan.outcomes
            for one in self._found(outcome)
        ]

    def _found(self, outcome: Outcome) -> list[outliers.Outlier]:
        path = outcome.layout.path
        if path in self.distances and path not in self._outliers:
            coefficients = self._plan.schedules[outcome.schedule].coefficients
            self._outliers[path] = outliers.find(self.distances[path], coefficients)
        return self._outliers.get(path, [])

    def warnings(self, *, again: bool) -> list[PlanWarning]:
        """Return one warning for each outlier; `again`: the output that the hint replaces is there.

        The hint leaves out all of them.
        """
        found: dict[int, tuple[Outcome, outliers.Outlier]] = {}
        for outcome in self._plan.outcomes:
            for one in self._found(outcome):
                found.setdefault(one.checkpoint, (outcome, one))
        more = ("--outliers", "error") if self._refuse else ("--stats",)
        hint = omitting.without(self._plan, sorted(found), again=again, more=more) if found else ""
        return [self._warning(*found[k], hint) for k in sorted(found)]

    def _warning(self, outcome: Outcome, one: outliers.Outlier, hint: str) -> PlanWarning:
        checkpoint = self._plan.run.checkpoints[one.checkpoint]
        where = f"{shorten(checkpoint.path, 1000)}: step {checkpoint.step or 0:,}"
        if one.kind == outliers.DUPLICATE:
            what = "holds the values of the checkpoint before it once more"
            return PlanWarning("duplicate", f"{where} {what}", hint)
        group = f"group '{shorten(one.group)}'"
        average = f"average '{outcome.average.label}'"
        far = f"{one.ratio:.1f} times as far from {average} as its neighbours"
        if one.everywhere:
            message = f"{where} is {far}, most of all in {group}"
        else:
            message = f"{where} is, in {group}, {far}"
        return PlanWarning("outlier", message, hint)

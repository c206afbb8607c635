"""What the program may cost, as ratios to the limit of the machine measured in the same run."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.contestants import GROUPS, LIMIT, PROCESS, START
from bench.measure import Score

Results = dict[str, list[Score]]


@dataclass(frozen=True)
class Verdict:
    """One budget beside what was measured; both may be missing."""

    label: str
    measured: float | None
    budget: float | None
    unit: str

    @property
    def text(self) -> str:
        """Return the verdict in words."""
        if self.measured is None:
            return "not measured"
        if self.budget is None:
            return "for information"
        return "within" if self.measured <= self.budget else "OVER"


def seconds(scores: Iterable[Score], name: str) -> float | None:
    """Return the best time of the contestant of that name, if it got to the end."""
    times = [s.best.seconds for s in scores if s.contestant.name == name and not s.error]
    return min(times, default=None)


def ratio(scores: list[Score], name: str, limit: str = LIMIT) -> float | None:
    """Return how many times the limit a process takes beyond the unavoidable start-up."""
    whole, start, least = (seconds(scores, n) for n in (name, START, limit))
    if whole is None or start is None or least is None:
        return None
    return (whole - start) / least


def quotient(scores: list[Score], name: str, limit: str) -> float | None:
    """Return how many times the limit a whole process takes."""
    whole, least = seconds(scores, name), seconds(scores, limit)
    return None if whole is None or least is None else whole / least


def extra(scores: list[Score], many: str, few: str) -> float | None:
    """Return the seconds that one contestant needs more than another."""
    slow, fast = seconds(scores, many), seconds(scores, few)
    return None if slow is None or fast is None else slow - fast


def peak(results: Results) -> float | None:
    """Return the largest memory that averaging ever took."""
    runs = (s for scores in results.values() for s in scores if is_run(s))
    return max((score.peak_mib for score in runs), default=None)


def is_run(score: Score) -> bool:
    """Tell whether this is the tool, averaging, and it got to the end."""
    contestant = score.contestant
    ours = contestant.role == PROCESS and contestant.name.startswith("ema-avg")
    return ours and bool(contestant.outputs) and bool(score.samples) and not score.error


def verdicts(results: Results) -> list[Verdict]:
    """Return all budgets in the order in which the documentation lists them."""
    f32, bf16, small, four, plan, cold = (results.get(key, []) for key in GROUPS)
    many, few, averages = "ema-avg, 20,000", "ema-avg, 32", "ema-avg, four averages"
    rows = (
        ("float32: (process - start) / limit", ratio(f32, "ema-avg"), 1.3, "x"),
        ("bfloat16: (process - start) / limit", ratio(bf16, "ema-avg"), 2.5, "x"),
        ("20,000 tensors instead of 32: extra", extra(small, many, few), 0.6, "s"),
        ("four averages: process / limit4", quotient(four, averages, "limit4"), 2.0, "x"),
        ("cold float32: (process - start) / limit", ratio(cold, "ema-avg"), None, "x"),
        ("resident memory of run", peak(results), 100.0, "MiB"),
        ("ema-avg --help", seconds(plan, "ema-avg --help"), 0.15, "s"),
        ("plan, 100 x 1,000 tensors", seconds(plan, "ema-avg plan"), 2.0, "s"),
    )
    return [Verdict(*row) for row in rows]

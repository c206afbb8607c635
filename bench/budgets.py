"""What the program may cost, as ratios to the limit of the machine measured in the same run."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.contestants import EMA_AVG, LIMIT, START
from bench.groups import GROUPS, ST, TF
from bench.measure import Score

Results = dict[str, list[Score]]
# A label, what was measured, what is allowed, and the unit of both.
Row = tuple[str, float | None, float | None, str]
TENSORFLOW = ("tf", "tf-small", "rename")
GENERAL = tuple(key for key in GROUPS if key not in TENSORFLOW)
SHADOW = ", shadow names"


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


def peak(results: Results, *keys: str, of: str = "") -> float | None:
    """Return the largest memory that averaging took in these groups, of contestants named so."""
    scores = [score for key in keys for score in results.get(key, [])]
    runs = (score for score in scores if is_run(score) and of in score.contestant.name)
    return max((score.peak_mib for score in runs), default=None)


def is_run(score: Score) -> bool:
    """Tell whether this is the tool, averaging, and it got to the end."""
    run = (*EMA_AVG, "run")
    ours = score.contestant.command[: len(run)] == run
    return ours and bool(score.samples) and not score.error


def verdicts(results: Results) -> list[Verdict]:
    """Return all budgets in the order in which the documentation lists them."""
    rows = (*general(results), *tensorflow(results))
    return [Verdict(*row) for row in rows]


def general(results: Results) -> tuple[Row, ...]:
    """Return the budgets of safetensors files, and those that hold for all formats."""
    f32, bf16, small, four, plan, cold = (results.get(key, []) for key in GENERAL)
    many, few, averages = "ema-avg, 20,000", "ema-avg, 32", "ema-avg, four averages"
    return (
        ("float32: (process - start) / limit", ratio(f32, "ema-avg"), 1.3, "x"),
        ("bfloat16: (process - start) / limit", ratio(bf16, "ema-avg"), 2.5, "x"),
        ("20,000 tensors instead of 32: extra", extra(small, many, few), 0.6, "s"),
        ("four averages: process / limit4", quotient(four, averages, "limit4"), 2.0, "x"),
        ("cold float32: (process - start) / limit", ratio(cold, "ema-avg"), None, "x"),
        ("resident memory of run", peak(results, *GENERAL), 100.0, "MiB"),
        ("ema-avg --help", seconds(plan, "ema-avg --help"), 0.15, "s"),
        ("plan, 100 x 1,000 tensors", seconds(plan, "ema-avg plan"), 2.0, "s"),
    )


def tensorflow(results: Results) -> tuple[Row, ...]:
    """Return the budgets of TensorFlow checkpoints, mostly beside safetensors files."""
    large, small, renamed = (results.get(key, []) for key in TENSORFLOW)
    large_peak, small_peak = (peak(results, key, of=TF) for key in TENSORFLOW[:2])

    def beside(scores: list[Score], names: str = "") -> float | None:
        return quotient(scores, f"ema-avg{TF}{names}", f"ema-avg{ST}{names}")

    def beside_cp(names: str) -> float | None:
        return quotient(renamed, f"rename to {names} names", "cp and fsync")

    return (
        (f"float32{TF} / safetensors, shadow names", beside(large, SHADOW), 1.25, "x"),
        (f"float32{TF} / safetensors, names kept", beside(large), None, "x"),
        (f"resident memory of run, 32 tensors{TF}", large_peak, 100.0, "MiB"),
        (f"open 20,000 tensors{TF}", seconds(small, f"open{TF}"), 0.3, "s"),
        (f"plan, 8 x 20,000 tensors{TF}", seconds(small, f"ema-avg plan{TF}"), None, "s"),
        (f"20,000 tensors{TF} / safetensors, shadow names", beside(small, SHADOW), None, "x"),
        (f"20,000 tensors{TF} / safetensors, names kept", beside(small), None, "x"),
        (f"resident memory of run, 20,000 tensors{TF}", small_peak, 100.0, "MiB"),
        (f"rename to variable names{TF} / cp and fsync", beside_cp("variable"), None, "x"),
        (f"rename to shadow names{TF} / cp and fsync", beside_cp("shadow"), None, "x"),
    )

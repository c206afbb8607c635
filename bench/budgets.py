"""What the program may cost, as ratios to the limit of the machine measured in the same run."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.contestants import EMA_AVG, LIMIT, START
from bench.groups import GROUPS, H5, PT, ST, TF
from bench.measure import Score

Results = dict[str, list[Score]]
# A label, what was measured, what is allowed, and the unit of both.
Row = tuple[str, float | None, float | None, str]
TENSORFLOW = ("tf", "tf-small", "rename")
PYTORCH, HDF5 = ("torch", "torch-small"), ("hdf5", "hdf5-small")
GENERAL = tuple(key for key in GROUPS if key not in (*TENSORFLOW, *PYTORCH, *HDF5))
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
    rows = (*general(results), *tensorflow(results), *pytorch(results), *hdf5(results))
    return [Verdict(*row) for row in rows]


def general(results: Results) -> tuple[Row, ...]:
    """Return the budgets of safetensors files, and those that hold for all formats."""
    f32, bf16, small, four, state, stats, plan, cold = (results.get(key, []) for key in GENERAL)
    many, few, averages = "ema-avg, 20,000", "ema-avg, 32", "ema-avg, four averages"
    plain, begun = f"ema-avg{SHADOW}", "ema-avg --state"
    return (
        ("float32: (process - start) / limit", ratio(f32, "ema-avg"), 1.3, "x"),
        ("bfloat16: (process - start) / limit", ratio(bf16, "ema-avg"), 2.5, "x"),
        ("20,000 tensors instead of 32: extra", extra(small, many, few), 0.6, "s"),
        ("four averages: process / limit4", quotient(four, averages, "limit4"), 2.0, "x"),
        ("with --state -o / without", quotient(state, f"{begun} -o", plain), 1.5, "x"),
        ("with --state / without", quotient(state, f"{begun} alone", plain), 1.5, "x"),
        ("with --stats / without", quotient(stats, "ema-avg --stats", "ema-avg"), None, "x"),
        ("cold float32: (process - start) / limit", ratio(cold, "ema-avg"), None, "x"),
        ("resident memory of run", peak(results, *GENERAL), 100.0, "MiB"),
        ("ema-avg --help", seconds(plan, "ema-avg --help"), 0.15, "s"),
        ("plan, 100 x 1,000 tensors", seconds(plan, "ema-avg plan"), 2.0, "s"),
    )


def beside(scores: list[Score], suffix: str, names: str = "") -> float | None:
    """Return how many times as long as with safetensors files the tool takes in a format."""
    return quotient(scores, f"ema-avg{suffix}{names}", f"ema-avg{ST}{names}")


def tensorflow(results: Results) -> tuple[Row, ...]:
    """Return the budgets of TensorFlow checkpoints, mostly beside safetensors files."""
    large, small, renamed = (results.get(key, []) for key in TENSORFLOW)
    large_peak, small_peak = (peak(results, key, of=TF) for key in TENSORFLOW[:2])

    def beside_cp(names: str) -> float | None:
        return quotient(renamed, f"rename to {names} names", "cp and fsync")

    return (
        (f"float32{TF} / safetensors, shadow names", beside(large, TF, SHADOW), 1.25, "x"),
        (f"float32{TF} / safetensors, names kept", beside(large, TF), None, "x"),
        (f"resident memory of run, 32 tensors{TF}", large_peak, 100.0, "MiB"),
        *many_tensors(small, TF, opening=0.3),
        (f"resident memory of run, 20,000 tensors{TF}", small_peak, 100.0, "MiB"),
        (f"rename to variable names{TF} / cp and fsync", beside_cp("variable"), None, "x"),
        (f"rename to shadow names{TF} / cp and fsync", beside_cp("shadow"), None, "x"),
    )


def many_tensors(scores: list[Score], suffix: str, opening: float | None) -> tuple[Row, ...]:
    """Return the times of files of many tensors; `opening` is the seconds that one may take."""
    title = f"20,000 tensors{suffix}"
    return (
        (f"open {title}", seconds(scores, f"open{suffix}"), opening, "s"),
        (f"plan, 8 x {title}", seconds(scores, f"ema-avg plan{suffix}"), None, "s"),
        (f"{title} / safetensors, shadow names", beside(scores, suffix, SHADOW), None, "x"),
        (f"{title} / safetensors, names kept", beside(scores, suffix), None, "x"),
    )


def pytorch(results: Results) -> tuple[Row, ...]:
    """Return the budgets of PyTorch files, whose names are kept unless asked otherwise."""
    large, small = (results.get(key, []) for key in PYTORCH)
    large_peak, small_peak = (peak(results, key, of=PT) for key in PYTORCH)
    peer = quotient(large, "fairseq's way", f"ema-avg mean{PT}")
    return (
        (f"float32{PT} / safetensors, names kept", beside(large, PT), 1.25, "x"),
        (f"float32{PT} / safetensors, shadow names", beside(large, PT, SHADOW), None, "x"),
        (f"mean{PT}: fairseq's way / ema-avg", peer, None, "x"),
        (f"resident memory of run, 32 tensors{PT}", large_peak, 100.0, "MiB"),
        *many_tensors(small, PT, opening=1.0),
        (f"resident memory of run, 20,000 tensors{PT}", small_peak, 100.0, "MiB"),
    )


def hdf5(results: Results) -> tuple[Row, ...]:
    """Return the budgets of HDF5 files; with many datasets they are for information only."""
    large, small = (results.get(key, []) for key in HDF5)
    large_peak, small_peak = (peak(results, key, of=H5) for key in HDF5)
    return (
        (f"float32{H5} / safetensors, names kept", beside(large, H5), 1.5, "x"),
        (f"float32{H5} / safetensors, shadow names", beside(large, H5, SHADOW), None, "x"),
        (f"resident memory of run, 32 tensors{H5}", large_peak, 100.0, "MiB"),
        *many_tensors(small, H5, opening=None),
        (f"resident memory of run, 20,000 tensors{H5}", small_peak, None, "MiB"),
    )

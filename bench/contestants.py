"""Who takes part: every contestant is one whole process with its inputs and its results."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.datasets import MIB, DataSet

PYTHON = sys.executable
EMA_AVG = (PYTHON, "-m", "ema_cli")
START, LIMIT, OVERLAPPED, PROCESS = "start", "limit", "limit, overlapped", "process"
# The best block size depends on the caches of the machine: the limit is the best of these.
BLOCKS = (MIB // 4, MIB, 4 * MIB)
AVERAGES = ("a=ema:0.9", "b=ema:0.99", "c=mean", "d=lr:1-sqrt")


@dataclass(frozen=True)
class Contestant:
    """One command; contestants of one name are variants, of which the fastest counts."""

    name: str
    role: str
    command: tuple[str, ...]
    data_set: DataSet | None = None
    outputs: tuple[Path, ...] = ()
    variant: str = ""


@dataclass(frozen=True)
class Group:
    """Contestants that run in turn over the same data, and the results that must be equal."""

    key: str
    title: str
    contestants: tuple[Contestant, ...]
    data_sets: tuple[DataSet, ...]
    cold: bool = False
    equal: tuple[tuple[Path, Path], ...] = ()


class Stage:
    """Builds contestants of one group, giving each a folder of its own for its results."""

    def __init__(self, data: Path, key: str) -> None:
        self.data = data
        self.folder = data / "out" / key

    def output(self, data_set: DataSet, name: str) -> Path:
        """Return where a contestant writes its result."""
        return self.folder / f"{name}-{data_set.key}" / "result.safetensors"

    def start(self) -> Contestant:
        """Return the start-up that every program on NumPy and click has to pay."""
        return Contestant("start", START, (PYTHON, "-c", "import numpy, click"))

    def limits(
        self, data_set: DataSet, *, results: int = 1, suffix: str = ""
    ) -> tuple[Contestant, ...]:
        """Return the limit in all block sizes: writing after reading, and while reading."""
        limit = LIMIT if results == 1 else f"{LIMIT}{results}"
        inputs = tuple(map(str, data_set.paths(self.data)))
        found = []
        for overlap in (False, True):
            folder = self.output(data_set, f"{limit}-overlapped" if overlap else limit)
            outputs = tuple(folder.with_stem(f"result-{i}") for i in range(results))
            targets = [word for path in outputs for word in ("--output", str(path))]
            for block in BLOCKS:
                flags = ["--block", str(block), *(["--overlap"] if overlap else []), *targets]
                found.append(
                    Contestant(
                        name=f"{limit}{', overlapped' if overlap else ''}{suffix}",
                        role=OVERLAPPED if overlap else LIMIT,
                        command=(PYTHON, "-m", "bench.limit", *flags, *inputs),
                        data_set=data_set,
                        outputs=outputs,
                        variant=f"{block // 1024} KiB",
                    )
                )
        return tuple(found)

    def numpy_script(self, data_set: DataSet, suffix: str = "") -> Contestant:
        """Return the script that needs nothing but NumPy and safetensors."""
        dtype = {"F32": "float32", "BF16": "bfloat16"}[data_set.dtype]
        output = self.output(data_set, "numpy")
        script = str(Path(__file__).with_name("numpy_script.py"))
        inputs = map(str, data_set.paths(self.data))
        command = (PYTHON, script, dtype, str(output), *inputs)
        return Contestant(f"numpy script{suffix}", PROCESS, command, data_set, (output,))

    def ema_avg(self, data_set: DataSet, names: str = "variable", suffix: str = "") -> Contestant:
        """Return the tool itself; the shadow layout is what it writes when not asked otherwise."""
        output = self.output(data_set, names)
        flags = ["--names", "variable"] if names == "variable" else []
        run = str(data_set.folder(self.data))
        options = ["-o", str(output), "--decay", "0.9", *flags, "--overwrite", "-q"]
        name = f"ema-avg{'' if flags else ', shadow names'}{suffix}"
        return Contestant(name, PROCESS, (*EMA_AVG, "run", run, *options), data_set, (output,))

    def same_results(self, *data_sets: DataSet) -> tuple[tuple[Path, Path], ...]:
        """Return the pairs that must hold the same tensors, bit for bit."""
        return tuple((self.output(d, "numpy"), self.output(d, "variable")) for d in data_sets)


def float32(sets: dict[str, DataSet], data: Path) -> Group:
    """One decay over float32, in both layouts of names."""
    stage, d = Stage(data, "f32"), sets["f32"]
    ours = (stage.ema_avg(d), stage.ema_avg(d, "shadow"))
    everyone = (stage.start(), *stage.limits(d), stage.numpy_script(d), *ours)
    return Group("f32", d.title, everyone, (d,), equal=stage.same_results(d))


def bfloat16(sets: dict[str, DataSet], data: Path) -> Group:
    """One decay over bfloat16 with float32 shadows."""
    stage, d = Stage(data, "bf16"), sets["bf16"]
    everyone = (stage.start(), *stage.limits(d), stage.numpy_script(d), stage.ema_avg(d))
    return Group("bf16", d.title, everyone, (d,), equal=stage.same_results(d))


def small(sets: dict[str, DataSet], data: Path) -> Group:
    """Many small tensors beside the same bytes in few: what a tensor costs."""
    stage, many, few = Stage(data, "small"), sets["small"], sets["large"]
    everyone = [stage.start()]
    for data_set, suffix in ((many, ", 20,000"), (few, ", 32")):
        everyone += stage.limits(data_set, suffix=suffix)
        everyone.append(stage.numpy_script(data_set, suffix))
        everyone.append(stage.ema_avg(data_set, suffix=suffix))
    title = f"{many.title}, and {few.title}"
    return Group("small", title, tuple(everyone), (many, few), equal=stage.same_results(many, few))


def four(sets: dict[str, DataSet], data: Path) -> Group:
    """Four averages in one pass over float32."""
    stage, d = Stage(data, "four"), sets["f32"]
    pattern = stage.output(d, "four").with_stem("result-{average}")
    labels = [spec.partition("=")[0] for spec in AVERAGES]
    outputs = tuple(pattern.with_stem(f"result-{label}") for label in labels)
    averages = [word for spec in AVERAGES for word in ("--average", spec)]
    options = ("-o", str(pattern), *averages, "--names", "variable", "--overwrite", "-q")
    command = (*EMA_AVG, "run", str(d.folder(data)), *options)
    tool = Contestant("ema-avg, four averages", PROCESS, command, d, outputs)
    limits = stage.limits(d, results=len(AVERAGES))
    return Group("four", f"{d.title}, four averages", (stage.start(), *limits, tool), (d,))


def plan(sets: dict[str, DataSet], data: Path) -> Group:
    """Compare plans, which read no tensor: what a user waits for before work begins."""
    stage, d = Stage(data, "plan"), sets["plan"]
    command = (*EMA_AVG, "plan", str(d.folder(data)), "--decay", "0.9")
    contestants = (
        stage.start(),
        Contestant("ema-avg --help", PROCESS, (*EMA_AVG, "--help")),
        Contestant("ema-avg plan", PROCESS, command),
    )
    return Group("plan", f"plan over {d.title}", contestants, (d,))


def cold(sets: dict[str, DataSet], data: Path) -> Group:
    """Run float32 again when nothing of it is in the page cache."""
    stage, d = Stage(data, "cold"), sets["f32"]
    everyone = (stage.start(), *stage.limits(d), stage.numpy_script(d), stage.ema_avg(d))
    equal = stage.same_results(d)
    return Group("cold", f"{d.title}, not in the page cache", everyone, (d,), True, equal)


GROUPS: dict[str, Callable[[dict[str, DataSet], Path], Group]] = {
    "f32": float32,
    "bf16": bfloat16,
    "small": small,
    "four": four,
    "plan": plan,
    "cold": cold,
}

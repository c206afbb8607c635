"""Who takes part: every contestant is one whole process with its inputs and its results."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.datasets import DATA, MIB, SUFFIXES, DataSet

PYTHON = sys.executable
EMA_AVG = (PYTHON, "-m", "ema_cli")
START, LIMIT, OVERLAPPED, PROCESS = "start", "limit", "limit, overlapped", "process"
OPEN = "open"
# These measure themselves and print it, without the start of the interpreter.
SELF_TIMED = (LIMIT, OVERLAPPED, OPEN)
# The best block size depends on the caches of the machine: the limit is the best of these.
BLOCKS = (MIB // 4, MIB, 4 * MIB)
AVERAGES = ("a=ema:0.9", "b=ema:0.99", "c=mean", "d=lr:1-sqrt")
# Files to copy follow the folder they go to.
COPY_AND_SYNC = 'to=$1; shift; cp "$@" "$to" && sync "$to"/*'


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
    """Contestants that run in turn over the same data, and the results that must be equal.

    Those that must be `close` were computed in another order, so they are rounded differently.
    """

    key: str
    title: str
    contestants: tuple[Contestant, ...]
    data_sets: tuple[DataSet, ...]
    cold: bool = False
    equal: tuple[tuple[Path, Path], ...] = ()
    close: tuple[tuple[Path, Path], ...] = ()


class Stage:
    """Builds contestants of one group, giving each a folder of its own for its results."""

    def __init__(self, data: Path, key: str) -> None:
        self.data = data
        self.folder = data / "out" / key

    def output(self, data_set: DataSet, name: str) -> Path:
        """Return the file with the tensor data of a contestant's result."""
        folder = self.folder / f"{name}-{data_set.key}"
        return folder / f"result{SUFFIXES[data_set.format]}"

    def target(self, data_set: DataSet, name: str) -> Path:
        """Return what the tool calls that result."""
        output = self.output(data_set, name)
        return output.with_name(output.name.removesuffix(DATA))

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

    def ema_avg(self, data_set: DataSet, suffix: str = "", names: str = "variable") -> Contestant:
        """Return the tool itself: names as they were, or those of shadows."""
        kind = "" if names == "variable" else ", shadow names"
        options = ("--decay", "0.9", "--names", names)
        return self.averaging(data_set, names, f"ema-avg{suffix}{kind}", options)

    def ema_avg_mean(self, data_set: DataSet, suffix: str = "") -> Contestant:
        """Return the tool computing the plain mean, names as they were."""
        options = ("--average", "mean", "--names", "variable")
        return self.averaging(data_set, "mean", f"ema-avg mean{suffix}", options)

    def averaging(
        self, data_set: DataSet, folder: str, name: str, options: tuple[str, ...]
    ) -> Contestant:
        """Return the tool with options of its own."""
        run, target = str(data_set.folder(self.data)), str(self.target(data_set, folder))
        command = (*EMA_AVG, "run", run, "-o", target, *options, "--overwrite", "-q")
        return Contestant(name, PROCESS, command, data_set, (self.output(data_set, folder),))

    def with_state(self, data_set: DataSet, *, output: bool) -> Contestant:
        """Return the tool beginning a state with the whole run, and writing its average or not."""
        name, folder = "ema-avg --state", "state" if output else "only-state"
        made = self.output(data_set, folder)
        state = made.with_name("S")
        run = str(data_set.folder(self.data))
        command = (*EMA_AVG, "run", run, "--state", str(state), "--decay", "0.9", "-q")
        if not output:
            return Contestant(f"{name} alone", PROCESS, command, data_set, (state / "slot.0",))
        command += ("-o", str(self.target(data_set, folder)))
        return Contestant(f"{name} -o", PROCESS, command, data_set, (made,))

    def torch_script(self, python: str, data_set: DataSet) -> Contestant:
        """Return fairseq's way, for which a Python with torch is needed."""
        output = self.output(data_set, "fairseq")
        script = str(Path(__file__).with_name("torch_script.py"))
        command = (python, script, str(output), *map(str, data_set.paths(self.data)))
        return Contestant("fairseq's way", PROCESS, command, data_set, (output,))

    def ema_avg_plan(self, data_set: DataSet, suffix: str = "") -> Contestant:
        """Return the tool looking at a run, of which it reads no tensor."""
        command = (*EMA_AVG, "plan", str(data_set.folder(self.data)), "--decay", "0.9")
        return Contestant(f"ema-avg plan{suffix}", PROCESS, command)

    def opening(self, data_set: DataSet, suffix: str = "") -> Contestant:
        """Return one call that opens the last checkpoint and reads no tensor."""
        path = str(data_set.checkpoint_paths(self.data)[-1])
        return Contestant(f"open{suffix}", OPEN, (PYTHON, "-m", "bench.opening", path))

    def rename(self, data_set: DataSet, names: str, suffix: str = "") -> Contestant:
        """Return the tool renaming the first checkpoint."""
        source, target = data_set.checkpoint_paths(self.data)[0], self.target(data_set, names)
        command = (*EMA_AVG, "rename", str(source), "-o", str(target), "--names", names, "-q")
        output = self.output(data_set, names)
        return Contestant(f"rename to {names} names{suffix}", PROCESS, command, None, (output,))

    def copy(self, data_set: DataSet, suffix: str = "") -> Contestant:
        """Return cp of the first checkpoint, and fsync."""
        files = data_set.files(self.data)
        source = map(str, files[: len(files) // data_set.checkpoints])
        output = self.folder / f"cp-{data_set.key}" / data_set.paths(self.data)[0].name
        command = ("sh", "-c", COPY_AND_SYNC, "sh", str(output.parent), *source)
        return Contestant(f"cp and fsync{suffix}", PROCESS, command, None, (output,))

    def same_results(self, *data_sets: DataSet) -> tuple[tuple[Path, Path], ...]:
        """Return the pairs that must hold the same tensors, bit for bit."""
        return tuple((self.output(d, "numpy"), self.output(d, "variable")) for d in data_sets)

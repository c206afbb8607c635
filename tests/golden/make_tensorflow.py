"""Write tensorflow.json: what TensorFlow's own moving averages make of the inputs in inputs.py.

    python make_tensorflow.py           needs tensorflow; runs it and writes tensorflow.json
    python make_tensorflow.py --check   needs numpy and ml_dtypes only; repeats it with NumPy

The check rebuilds every record with NumPy and compares it with the stored one. It exits with 1
when any record differs, apart from single bias factors: TensorFlow takes those from the C
library's powf, which is not always correctly rounded, so they are counted and listed.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from inputs import Array, variable

GOLDEN = Path(__file__).with_name("tensorflow.json")
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
UPDATES = 50
SAVED = (1, 10, UPDATES)  # updates after which a digest is kept
FACTOR_UPDATES = 400
FACTOR_DECAYS = (0.9, 0.99, 0.999, 0.9999, 0.995, 0.997, 0.9998)
OMD_DECAYS = (0.9, 0.99, 0.999, 0.9999, 0.5, 0.25, 0.0, 1.0, 0.9999999, 0.99999999)
OMD_NUM_UPDATES = (0, 1, 2, 5, 9, 10, 50, 100, 1000, 8989, 8990, 89948, 89949, 10**6)

Record = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """How num_updates follows the number of the update: ``stride`` times it."""

    name: str
    stride: int


@dataclass(frozen=True)
class Case:
    """One moving average: ``updates`` updates of ``count`` elements."""

    dtype: str
    decay: float
    num_updates: Rule | None
    count: int
    seed: int
    updates: int = UPDATES

    def n(self, update: int) -> int | None:
        return self.num_updates.stride * update if self.num_updates else None

    def value(self, update: int) -> Array:
        return variable(self.seed, update, self.count, DTYPES[self.dtype])


COUNT, STEP = Rule("count", 1), Rule("step", 100)
AVERAGES = ((0.99, None), (0.9999, None), (0.999, COUNT), (0.9, STEP))
DEBIASED = ((0.99, None), (0.999, COUNT))


def average_cases(dtype: str) -> list[Case]:
    return [Case(dtype, decay, rule, count=1_000_000, seed=1) for decay, rule in AVERAGES]


def debiased_cases(dtype: str) -> list[Case]:
    return [Case(dtype, decay, rule, count=100_000, seed=2) for decay, rule in DEBIASED]


class Backend(Protocol):
    """What TensorFlow and its NumPy emulation both can do."""

    def averages(self, cases: Sequence[Case]) -> Iterator[list[Array]]:
        """The shadow of every case after each update; the cases share one variable."""
        ...

    def debiased(self, case: Case) -> Iterator[tuple[Array, Array, Array]]:
        """Shadow, ``biased`` and ``local_step`` after each update, with zero_debias."""
        ...

    def omd(self, dtype: str, decay: float, ns: Sequence[int | None]) -> list[float]:
        """1 - decay as it multiplies a variable of this dtype, for each num_updates."""
        ...

    def bias_factors(self, dtype: str, decay: float) -> Array:
        """What zero_debias divides by at updates 1, 2, ... FACTOR_UPDATES."""
        ...


class Emulation:
    """TensorFlow's arithmetic in NumPy."""

    def averages(self, cases: Sequence[Case]) -> Iterator[list[Array]]:
        shadows = [cases[0].value(0) for _ in cases]
        for update in range(1, UPDATES + 1):
            value = cases[0].value(update)
            shadows = [
                moved(shadow, value, omd_of(case.dtype, case.decay, case.n(update)))
                for shadow, case in zip(shadows, cases, strict=True)
            ]
            yield shadows

    def debiased(self, case: Case) -> Iterator[tuple[Array, Array, Array]]:
        dtype = DTYPES[case.dtype]
        biased, local_step = np.zeros(case.count, dtype), np.zeros((), dtype)
        for update in range(1, UPDATES + 1):
            omd = omd_of(case.dtype, case.decay, case.n(update))
            biased = moved(biased, case.value(update), omd)
            local_step = np.asarray(local_step + dtype.type(1))
            yield biased / bias_factor(omd, float(local_step)), biased, local_step

    def omd(self, dtype: str, decay: float, ns: Sequence[int | None]) -> list[float]:
        return [float(omd_of(dtype, decay, n)) for n in ns]

    def bias_factors(self, dtype: str, decay: float) -> Array:
        omd, step = omd_of(dtype, decay, None), DTYPES[dtype].type(0)
        factors = []
        for _ in range(FACTOR_UPDATES):
            step = step + DTYPES[dtype].type(1)  # bfloat16 stays at 256
            factors.append(bias_factor(omd, float(step)))
        return np.array(factors, DTYPES[dtype])


def omd_of(dtype: str, decay: float, n: int | None) -> Any:
    """1 - decay, formed in float32 and then cast to the variable's dtype."""
    used = np.float32(decay)
    if n is not None:
        used = min(used, (np.float32(1) + np.float32(n)) / (np.float32(10) + np.float32(n)))
    return (np.float32(1) - used).astype(DTYPES[dtype])


def moved(shadow: Array, value: Array, omd: Any) -> Array:
    """One update: three operations, each rounded to the dtype of the arrays."""
    moved: Array = shadow - (shadow - value) * omd
    return moved


def bias_factor(omd: Any, local_step: float) -> Any:
    """1 - (1 - omd) ** local_step, with the power rounded once from float64."""
    one = omd.dtype.type(1)
    return one - omd.dtype.type(math.pow(float(one - omd), local_step))


class TensorFlow:
    """The real thing: tf.compat.v1.train.ExponentialMovingAverage in a graph, on the CPU."""

    def __init__(self) -> None:
        import tensorflow

        self.tf = tensorflow.compat.v1
        self.tf.disable_v2_behavior()
        self.tf.enable_resource_variables()

    def session(self) -> Any:
        threads = {"inter_op_parallelism_threads": 1, "intra_op_parallelism_threads": 2}
        return self.tf.Session(config=self.tf.ConfigProto(device_count={"GPU": 0}, **threads))

    def averages(self, cases: Sequence[Case]) -> Iterator[list[Array]]:
        with self.tf.Graph().as_default(), self.session() as session:
            fed = self.tf.placeholder(cases[0].dtype, [cases[0].count])
            weights = self.tf.get_variable("weights", initializer=fed)
            assign = weights.assign(fed)
            averages = [Average(self.tf, case.decay, case.num_updates, weights) for case in cases]
            session.run(self.tf.global_variables_initializer(), {fed: cases[0].value(0)})
            for update in range(1, UPDATES + 1):
                session.run(assign, {fed: cases[0].value(update)})
                for average, case in zip(averages, cases, strict=True):
                    average.run(session, case.n(update))
                yield session.run([average.shadow for average in averages])

    def debiased(self, case: Case) -> Iterator[tuple[Array, Array, Array]]:
        with self.tf.Graph().as_default(), self.session() as session:
            fed = self.tf.placeholder(case.dtype, [case.count])
            value = self.tf.identity(fed)
            average = Average(self.tf, case.decay, case.num_updates, value, zero_debias=True)
            slots = [average.shadow, self.slot("/biased"), self.slot("/local_step")]
            session.run(self.tf.global_variables_initializer())
            for update in range(1, UPDATES + 1):
                average.run(session, case.n(update), {fed: case.value(update)})
                shadow, biased, local_step = session.run(slots)
                yield shadow, biased, np.asarray(local_step)

    def slot(self, suffix: str) -> Any:
        [found] = [v for v in self.tf.global_variables() if v.op.name.endswith(suffix)]
        return found

    def omd(self, dtype: str, decay: float, ns: Sequence[int | None]) -> list[float]:
        """Observed: a shadow of 0 with the value -1 becomes 0 - (0 + 1) * omd, exactly -omd."""
        with self.tf.Graph().as_default(), self.session() as session:
            zero, minus_one = (self.tf.constant(x, dtype) for x in (0.0, -1.0))
            weight = self.tf.get_variable("weight", initializer=minus_one)
            plain = Average(self.tf, decay, None, weight)
            counted = Average(self.tf, decay, COUNT, weight)
            resets = [average.shadow.assign(zero) for average in (plain, counted)]
            session.run(self.tf.global_variables_initializer())
            seen = []
            for n in ns:
                session.run(resets)
                average = plain if n is None else counted
                average.run(session, n)
                seen.append(0.0 - float(session.run(average.shadow)))
            return seen

    def bias_factors(self, dtype: str, decay: float) -> Array:
        """Observed: the divisor in the update's only division."""
        with self.tf.Graph().as_default() as graph, self.session() as session:
            value = self.tf.identity(self.tf.constant(1.0, dtype))
            average = Average(self.tf, decay, None, value, zero_debias=True)
            [division] = [op for op in graph.get_operations() if op.type == "RealDiv"]
            fetches = [division.inputs[1], average.update]
            session.run(self.tf.global_variables_initializer())
            factors = [session.run(fetches)[0] for _ in range(FACTOR_UPDATES)]
            return np.array(factors, DTYPES[dtype])


class Average:
    """One moving average in the default graph, with the variable that holds its num_updates."""

    def __init__(
        self, tf: Any, decay: float, rule: Rule | None, of: Any, zero_debias: bool = False
    ) -> None:
        self.fed = tf.placeholder(tf.int64, [])
        n: Any = tf.Variable(0, dtype=tf.int64, trainable=False) if rule else None
        self.count = n.assign(self.fed) if rule else None
        ema = tf.train.ExponentialMovingAverage(decay, num_updates=n, zero_debias=zero_debias)
        self.update = ema.apply([of])
        self.shadow = ema.average(of)

    def run(self, session: Any, n: int | None, feed: dict[Any, Array] | None = None) -> None:
        if n is not None:
            session.run(self.count, {self.fed: n})
        session.run(self.update, feed)


def summary(array: Array) -> Record:
    """Digest and first elements of an array's little-endian bytes."""
    little = array.view(np.dtype(f"u{array.itemsize}")).astype(f"<u{array.itemsize}")
    digest = hashlib.sha256(little.tobytes()).hexdigest()
    return {"sha256": digest, "first8": little[:8].tobytes().hex()}


def input_records() -> list[Record]:
    cases = [make(dtype)[0] for make in (average_cases, debiased_cases) for dtype in DTYPES]
    return [
        {
            "dtype": case.dtype,
            "seed": case.seed,
            "count": case.count,
            "after": {str(update): summary(case.value(update)) for update in (0, *SAVED)},
        }
        for case in cases
    ]


def average_records(backend: Backend) -> list[Record]:
    records: list[Record] = []
    for dtype in DTYPES:
        cases = average_cases(dtype)
        made: list[Record] = [{**asdict(case), "after": {}} for case in cases]
        for update, shadows in enumerate(backend.averages(cases), 1):
            if update in SAVED:
                for record, shadow in zip(made, shadows, strict=True):
                    record["after"][str(update)] = summary(shadow)
        records += made
    return records


def debiased_records(backend: Backend) -> list[Record]:
    return [
        {**asdict(case), "after": dict(debiased_states(backend, case))}
        for dtype in DTYPES
        for case in debiased_cases(dtype)
    ]


def debiased_states(backend: Backend, case: Case) -> Iterator[tuple[str, Record]]:
    for update, (shadow, biased, local_step) in enumerate(backend.debiased(case), 1):
        if update in SAVED:
            yield (
                str(update),
                {
                    "shadow": summary(shadow),
                    "biased": summary(biased),
                    "local_step": {
                        "dtype": local_step.dtype.name,
                        "shape": list(local_step.shape),
                        "value": float(local_step),
                    },
                },
            )


def omd_records(backend: Backend) -> list[Record]:
    ns = (None, *OMD_NUM_UPDATES)
    records = []
    for decay in OMD_DECAYS:
        columns = {dtype: backend.omd(dtype, decay, ns) for dtype in DTYPES}
        for row, n in enumerate(ns):
            seen = {dtype: column[row].hex() for dtype, column in columns.items()}
            records.append({"decay": decay, "num_updates": n, **seen})
    return records


def factor_records(backend: Backend) -> list[Record]:
    records = []
    for dtype in DTYPES:
        for decay in FACTOR_DECAYS:
            factors = backend.bias_factors(dtype, decay)
            size = factors.itemsize
            raw = factors.view(f"u{size}").astype(f"<u{size}").tobytes().hex()
            records.append({"dtype": dtype, "decay": decay, "updates": len(factors), "hex": raw})
    return records


def cpu() -> Record:
    """Machine type and the vector extensions that choose between TensorFlow's kernels."""
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16")
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        words = []
    return {"machine": platform.machine(), "flags": [flag for flag in wanted if flag in words]}


def tensorflow_version() -> str:
    import tensorflow

    return str(tensorflow.__version__)


def document(backend: Backend) -> Record:
    return {
        "about": "Made by make_tensorflow.py from inputs.py. Digests and hex are of little-endian "
        "bytes; num_updates at update k is stride * k; keys of 'after' are update numbers.",
        "inputs": input_records(),
        "averages": average_records(backend),
        "zero_debias": debiased_records(backend),
        "omd": omd_records(backend),
        "bias_factors": factor_records(backend),
    }


def write() -> None:
    versions = {name: version(name) for name in ("numpy", "ml_dtypes")}
    made_with = {"tensorflow": tensorflow_version(), "python": platform.python_version()}
    golden = {"made_with": {**made_with, **versions, "cpu": cpu()}, **document(TensorFlow())}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


def check() -> int:
    """Print how many records of each section NumPy reproduces; 1 when one of them differs."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    rebuilt = json.loads(json.dumps(document(Emulation())))
    failed = False
    for section in ("inputs", "averages", "zero_debias", "omd"):
        pairs = list(zip(golden[section], rebuilt[section], strict=True))
        wrong = [old for old, new in pairs if old != new]
        failed |= bool(wrong)
        print(f"{section}: {len(pairs) - len(wrong)} of {len(pairs)} records identical")
        for record in wrong:
            print("  differs:", {k: v for k, v in record.items() if k != "after"})
    for old, new in zip(golden["bias_factors"], rebuilt["bias_factors"], strict=True):
        report_factors(old, new)
    return int(failed)


def report_factors(old: Record, new: Record) -> None:
    theirs, ours = (raw_integers(record).astype(np.int64) for record in (old, new))
    differing = {int(k) + 1: int(ours[k] - theirs[k]) for k in np.flatnonzero(ours != theirs)}
    same = old["updates"] - len(differing)
    print(f"bias_factors {old['dtype']} {old['decay']}: {same} of {old['updates']} identical")
    if differing:
        print("  ulps by update:", differing)


def raw_integers(record: Record) -> Array:
    size = DTYPES[record["dtype"]].itemsize
    return np.frombuffer(bytes.fromhex(record["hex"]), f"<u{size}")


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        return check()
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())

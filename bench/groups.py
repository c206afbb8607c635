"""What is measured together: each group is a set of contestants over the same data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.contestants import AVERAGES, EMA_AVG, PROCESS, Contestant, Group, Stage
from bench.datasets import DataSet
from bench.peer import torch_peer

# What the names of contestants end with where two formats take part.
TF, PT, H5, ST = ", TensorFlow", ", PyTorch", ", HDF5", ", safetensors"


def float32(sets: dict[str, DataSet], data: Path) -> Group:
    """One decay over float32, in both layouts of names."""
    stage, d = Stage(data, "f32"), sets["f32"]
    ours = (stage.ema_avg(d), stage.ema_avg(d, names="shadow"))
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


def state(sets: dict[str, DataSet], data: Path) -> Group:
    """Begin a state with a batch of checkpoints, beside the same run without."""
    stage, d = Stage(data, "state"), sets["f32"]
    plain = stage.ema_avg(d, names="shadow")
    states = [stage.with_state(d, output=output) for output in (False, True)]
    equal = ((stage.output(d, "shadow"), stage.output(d, "state")),)
    everyone = (stage.start(), plain, *states)
    return Group("state", f"{d.title}, with a state", everyone, (d,), equal=equal)


def stats(sets: dict[str, DataSet], data: Path) -> Group:
    """Measure the distance of every checkpoint on the way, beside the same run without."""
    stage, d = Stage(data, "stats"), sets["f32"]
    measuring = ("--decay", "0.9", "--names", "variable", "--stats")
    tool = stage.averaging(d, "stats", "ema-avg --stats", measuring)
    equal = ((stage.output(d, "variable"), stage.output(d, "stats")),)
    everyone = (stage.start(), *stage.limits(d), stage.ema_avg(d), tool)
    title = f"{d.title}, with distances"
    return Group("stats", title, everyone, (d,), equal=equal)


def plan(sets: dict[str, DataSet], data: Path) -> Group:
    """Compare plans, which read no tensor: what a user waits for before work begins."""
    stage, d = Stage(data, "plan"), sets["plan"]
    contestants = (
        stage.start(),
        Contestant("ema-avg --help", PROCESS, (*EMA_AVG, "--help")),
        stage.ema_avg_plan(d),
    )
    return Group("plan", f"plan over {d.title}", contestants, (d,))


def cold(sets: dict[str, DataSet], data: Path) -> Group:
    """Run float32 again when nothing of it is in the page cache."""
    stage, d = Stage(data, "cold"), sets["f32"]
    everyone = (stage.start(), *stage.limits(d), stage.numpy_script(d), stage.ema_avg(d))
    equal = stage.same_results(d)
    return Group("cold", f"{d.title}, not in the page cache", everyone, (d,), True, equal)


def both_formats(
    stage: Stage, d: DataSet, other: DataSet, suffix: str
) -> tuple[tuple[Contestant, ...], tuple[tuple[Path, Path], ...]]:
    """Return the tool on the same values in both formats, and which results must be equal.

    In both layouts of names: as they were, for which the structure of the last checkpoint is
    filled anew, and those of shadows, for which a new one is made.
    """
    layouts, pair = ("shadow", "variable"), ((other, ST), (d, suffix))
    ours = (stage.ema_avg(*one, names) for names in layouts for one in pair)
    equal = ((stage.output(other, names), stage.output(d, names)) for names in layouts)
    return tuple(ours), tuple(equal)


def beside_safetensors(d: DataSet, other: DataSet) -> str:
    """Return the title of a group of two formats."""
    return f"{d.title}, and {other.title} as safetensors files"


def large_in(sets: dict[str, DataSet], data: Path, key: str, suffix: str) -> Group:
    """One decay over float32 in another format beside the same in safetensors files."""
    stage, d, other = Stage(data, key), sets[key], sets["f32"]
    ours, equal = both_formats(stage, d, other, suffix)
    everyone = (stage.start(), *stage.limits(d), *ours)
    return Group(key, beside_safetensors(d, other), everyone, (d, other), equal=equal)


def small_in(sets: dict[str, DataSet], data: Path, key: str, suffix: str) -> Group:
    """Many small tensors: opening and planning, which are all index, and averaging."""
    stage, d, other = Stage(data, key), sets[key], sets["small"]
    ours, equal = both_formats(stage, d, other, suffix)
    everyone = [stage.start(), *stage.limits(d)]
    for pair in ((other, ST), (d, suffix)):
        everyone += [stage.opening(*pair), stage.ema_avg_plan(*pair)]
    title = beside_safetensors(d, other)
    return Group(key, title, (*everyone, *ours), (d, other), equal=equal)


def tensorflow(sets: dict[str, DataSet], data: Path) -> Group:
    """TensorFlow checkpoints."""
    return large_in(sets, data, "tf", TF)


def tensorflow_small(sets: dict[str, DataSet], data: Path) -> Group:
    """TensorFlow checkpoints of many small tensors."""
    return small_in(sets, data, "tf-small", TF)


def torch(sets: dict[str, DataSet], data: Path) -> Group:
    """PyTorch files, and the mean of them in both ways where torch is installed."""
    group, stage, d = large_in(sets, data, "torch", PT), Stage(data, "torch"), sets["torch"]
    peer = torch_peer()
    if peer is None:
        return group
    theirs, ours = stage.torch_script(peer.python, d), stage.ema_avg_mean(d, PT)
    return replace(
        group,
        contestants=(*group.contestants, theirs, ours),
        close=((stage.output(d, "fairseq"), stage.output(d, "mean")),),
    )


def torch_small(sets: dict[str, DataSet], data: Path) -> Group:
    """PyTorch files of many small tensors."""
    return small_in(sets, data, "torch-small", PT)


def hdf5(sets: dict[str, DataSet], data: Path) -> Group:
    """HDF5 files whose datasets are contiguous, as Keras writes them."""
    return large_in(sets, data, "hdf5", H5)


def hdf5_small(sets: dict[str, DataSet], data: Path) -> Group:
    """HDF5 files of many small datasets: for information, nothing is promised of them."""
    group = small_in(sets, data, "hdf5-small", H5)
    return replace(group, title=f"{group.title} (for information)")


def rename(sets: dict[str, DataSet], data: Path) -> Group:
    """Copy one TensorFlow checkpoint under other names, towards those of variables and shadows."""
    stage, variables, shadows = Stage(data, "rename"), sets["tf"], sets["tf-shadow"]
    everyone = (
        stage.start(),
        stage.copy(variables),
        stage.rename(shadows, "variable"),
        stage.rename(variables, "shadow"),
    )
    equal = (
        (variables.paths(data)[0], stage.output(shadows, "variable")),
        (shadows.paths(data)[0], stage.output(variables, "shadow")),
    )
    title = f"rename one of {variables.title}"
    return Group("rename", title, everyone, (variables, shadows), equal=equal)


GROUPS: dict[str, Callable[[dict[str, DataSet], Path], Group]] = {
    "f32": float32,
    "bf16": bfloat16,
    "small": small,
    "four": four,
    "state": state,
    "stats": stats,
    "plan": plan,
    "cold": cold,
    "tf": tensorflow,
    "tf-small": tensorflow_small,
    "rename": rename,
    "torch": torch,
    "torch-small": torch_small,
    "hdf5": hdf5,
    "hdf5-small": hdf5_small,
}

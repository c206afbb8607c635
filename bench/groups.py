"""What is measured together: each group is a set of contestants over the same data."""

from collections.abc import Callable
from pathlib import Path

from bench.contestants import AVERAGES, EMA_AVG, PROCESS, Contestant, Group, Stage
from bench.datasets import DataSet

# What the names of contestants end with where both formats take part.
TF, ST = ", TensorFlow", ", safetensors"


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


def both_formats(stage: Stage, *pair: DataSet) -> tuple[list[Contestant], list[tuple[Path, Path]]]:
    """Return the tool on the same values in both formats, and which results must be equal.

    In both layouts of names: as they were, for which the index or header of the last checkpoint is
    filled anew, and those of shadows, for which a new one is made.
    """
    layouts = ("shadow", "variable")
    ours = [
        stage.ema_avg(d, names, suffix)
        for names in layouts
        for d, suffix in zip(pair, (ST, TF), strict=True)
    ]
    first, second = ([stage.output(d, names) for names in layouts] for d in pair)
    return ours, list(zip(first, second, strict=True))


def tensorflow(sets: dict[str, DataSet], data: Path) -> Group:
    """One decay over float32 in TensorFlow checkpoints beside the same in safetensors files."""
    stage, d, other = Stage(data, "tf"), sets["tf"], sets["f32"]
    ours, equal = both_formats(stage, other, d)
    everyone = (stage.start(), *stage.limits(d), *ours)
    title = f"{d.title}, and {other.title} as safetensors files"
    return Group("tf", title, everyone, (d, other), equal=tuple(equal))


def tensorflow_small(sets: dict[str, DataSet], data: Path) -> Group:
    """Many small tensors: opening and planning, which are all index, and averaging."""
    stage, d, other = Stage(data, "tf-small"), sets["tf-small"], sets["small"]
    ours, equal = both_formats(stage, other, d)
    everyone = [stage.start(), *stage.limits(d)]
    for data_set, suffix in ((other, ST), (d, TF)):
        everyone += [stage.opening(data_set, suffix), stage.ema_avg_plan(data_set, suffix)]
    title = f"{d.title}, and {other.title} as safetensors files"
    return Group("tf-small", title, (*everyone, *ours), (d, other), equal=tuple(equal))


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
    "plan": plan,
    "cold": cold,
    "tf": tensorflow,
    "tf-small": tensorflow_small,
    "rename": rename,
}

"""graph/: an average is restored as a moving average of the training would be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file
from support import (
    EVALUATION,
    FIXTURES,
    GRAPH,
    SHADOW,
    Array,
    Arrays,
    agreed,
    differences,
    files,
    latest,
    moving_average,
    restored,
    same,
    session,
    theirs,
    tool,
    v1,
)

import ema_cli

FIRST, LAST = (GRAPH / f"digits.ckpt-{step}" for step in (0, 300))
STEPS = range(0, 301, 20)
STATISTICS = ("conv/batch_norm/moving_mean", "conv/batch_norm/moving_variance")


def evaluated(prefix: str, name: str = SHADOW, statistics: bool = False) -> dict[str, Array]:
    """Restore a checkpoint as the program does that evaluates; return the values by their names.

    Args:
        prefix: of the checkpoint.
        name: of the moving average.
        statistics: whether the program counts them among its moving averages.
    """
    with tf.Graph().as_default():
        v1.train.import_meta_graph(str(EVALUATION))
        averaged = v1.trainable_variables()
        if statistics:
            averaged += [v for v in v1.global_variables() if v.op.name in STATISTICS]
        ema = v1.train.ExponentialMovingAverage(0.9, name=name)
        found = restored(prefix, ema.variables_to_restore(averaged))
    assert len(found) == 10
    assert sum(key.endswith(f"/{name}") for key in found) == len(averaged)
    return found


def trained(prefix: str) -> dict[str, Array]:
    """Restore a checkpoint into the graph of the training; return the values by their names."""
    with tf.Graph().as_default():
        v1.train.import_meta_graph(f"{FIRST}.meta", clear_devices=True)
        return restored(prefix)


def shadows(values: Arrays, name: str = SHADOW) -> dict[str, Array]:
    """Return those of the values that are moving averages."""
    return {key: value for key, value in values.items() if key.endswith(f"/{name}")}


def part(values: Arrays, names: Iterable[str]) -> dict[str, Array]:
    """Return the values with these names."""
    return {name: values[name] for name in names}


# ---------------------------------------------------------------------------- shadow names


def test_an_evaluation_restores_the_average(average: Path) -> None:
    """`variables_to_restore` and `latest_checkpoint` work, and give the bits in the file."""
    found = evaluated(latest(average))
    assert differences(found, part(agreed(latest(average)), found)) == []


def test_the_average_is_that_of_the_training(average: Path) -> None:
    """Restored weights have the bits of the shadows that TensorFlow kept while it trained."""
    found = shadows(evaluated(latest(average)))
    training = theirs(LAST)
    assert differences(found, part(training, found)) == []
    for name, value in found.items():
        assert not same(value, training[name.removesuffix(f"/{SHADOW}")])


def test_everything_restored_is_the_training_s_where_that_is_asked_for(tmp_path: Path) -> None:
    """With TensorFlow's own choices: statistics are copied, half types average in themselves."""
    tool(
        *("run", GRAPH, "-o", f"{tmp_path}/", "--decay", "0.9"),
        *("--shadow-dtype", "same", "--statistics", "copy"),
    )
    training = theirs(LAST)
    found = evaluated(latest(tmp_path))
    assert differences(found, part(training, found)) == []
    saved = agreed(latest(tmp_path))
    assert differences(saved, part(training, saved)) == []


def test_the_network_sees_what_it_sees_with_the_training_s_shadows(tmp_path: Path) -> None:
    """797 held-out digits through the restored network: the same logits."""
    out = f"{tmp_path}/"
    tool("run", GRAPH, "-o", out, "--decay", "0.9", "--statistics", "copy")
    images = load_file(FIXTURES / "digits" / "heldout.safetensors")["images"].astype(np.float32)
    logits = []
    for prefix in (latest(tmp_path), str(LAST)):
        with tf.Graph().as_default():
            v1.train.import_meta_graph(str(EVALUATION))
            ema = v1.train.ExponentialMovingAverage(0.9)
            saver = v1.train.Saver(ema.variables_to_restore())
            with session() as active:
                saver.restore(active, prefix)
                logits.append(active.run("head.v2-final>10/add:0", {"images:0": images}))
    assert logits[0].shape == (797, 10)
    assert same(*logits)


def test_averages_of_statistics_restore_too(average: Path) -> None:
    """A program that counts statistics among its moving averages finds TensorFlow's average."""
    found = evaluated(latest(average), statistics=True)
    saved = agreed(latest(average))
    assert differences(found, part(saved, found)) == []
    for name in STATISTICS:
        values = [theirs(GRAPH / f"digits.ckpt-{step}")[name] for step in STEPS]
        expected = moving_average(values, 0.9)
        assert same(found[f"{name}/{SHADOW}"], expected)
        assert same(saved[name], expected)


def test_a_named_average_with_a_ramp(tmp_path: Path) -> None:
    """`ExponentialMovingAverage(0.95, global_step, name="ramp")`, restored under that name."""
    tool(
        *("run", GRAPH, "-o", f"{tmp_path}/", "--decay", "0.95"),
        *("--num-updates", "step", "--name", "ramp"),
    )
    found = evaluated(latest(tmp_path), "ramp")
    assert differences(found, part(agreed(latest(tmp_path)), found)) == []
    mine = shadows(found, "ramp")
    assert differences(mine, part(theirs(LAST), mine)) == []


def test_every_average_of_one_pass_is_found_in_its_folder(tmp_path: Path) -> None:
    """Two outputs, `OUT/{average}/`: each has the state file that names it."""
    out = f"{tmp_path}/{{average}}/"
    tool("run", GRAPH, "-o", out, "--average", "mean", "--average", "late=mean@last=2")
    found = [evaluated(latest(tmp_path / label)) for label in ("mean", "late")]
    for label, values in zip(("mean", "late"), found, strict=True):
        assert differences(values, part(agreed(latest(tmp_path / label)), values)) == []
    assert set(shadows(found[0])) <= set(differences(*found))


# ---------------------------------------------------------------------------- plain names


def test_the_training_graph_restores_an_average_with_plain_names(tmp_path: Path) -> None:
    """`--names variable`: a plain Saver finds everything, slots, shadows and step included."""
    tool("run", GRAPH, "-o", f"{tmp_path}/", "--decay", "0.9", "--names", "variable")
    found, training = trained(latest(tmp_path)), theirs(LAST)
    assert differences(found, agreed(latest(tmp_path))) == []
    assert found.keys() == training.keys()
    averages = shadows(training)
    assert len(averages) == 5
    assert differences(shadows(found), averages) == []
    averaged = {name.removesuffix(f"/{SHADOW}"): value for name, value in averages.items()}
    assert differences(part(found, averaged), averaged) == []
    rest = found.keys() - averages.keys() - averaged.keys() - {*STATISTICS}
    assert {"global_step", "class_names", "conv/kernel/Momentum", "conv/kernel/ramp"} <= rest
    assert differences(part(found, rest), part(training, rest)) == []


def test_the_training_goes_on_from_an_average(tmp_path: Path) -> None:
    """As a program resumes: `import_meta_graph(...).restore`, then a step of the optimizer."""
    tool("run", GRAPH, "-o", f"{tmp_path}/", "--decay", "0.9", "--names", "variable")
    with tf.Graph().as_default() as graph:
        saver = v1.train.import_meta_graph(f"{FIRST}.meta", clear_devices=True)
        step = v1.convert_to_tensor(v1.train.get_global_step())
        with session() as active:
            saver.restore(active, latest(tmp_path))
            feed = {"images:0": np.ones((16, 64), np.float32), "labels:0": np.arange(16) % 10}
            active.run(graph.get_operation_by_name("Momentum"), feed)
            assert active.run(step) == 301


def test_shadows_beside_variables_and_optimizer_state(tmp_path: Path) -> None:
    """`--keep-variables --optimizer keep`: the training graph restores what it had saved."""
    tool(
        *("run", GRAPH, "-o", f"{tmp_path}/", "--decay", "0.9", "--statistics", "copy"),
        *("--keep-variables", "--optimizer", "keep"),
    )
    agreed(latest(tmp_path))
    assert differences(trained(latest(tmp_path)), theirs(LAST)) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_dtype_is_restored_by_a_variable_of_that_dtype(tmp_path: Path, dtype: str) -> None:
    """`--dtype`: TensorFlow refuses any other; the float32 average is rounded once."""
    out = tmp_path / "out"
    tool("run", GRAPH, "-o", out, "--decay", "0.9", "--dtype", dtype)
    agreed(out)
    name = f"conv/kernel/{SHADOW}"
    expected = theirs(LAST)[name].astype(tf.as_dtype(dtype).as_numpy_dtype)
    with tf.Graph().as_default():
        variable = v1.get_variable("conv/kernel", expected.shape, dtype)
        assert differences(restored(out, {name: variable}), {name: expected}) == []


# ---------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    "words, meta",
    [((), EVALUATION), (("--names", "variable"), f"{FIRST}.meta")],
    ids=["shadow names", "plain names"],
)
def test_the_line_that_is_printed_restores(
    tmp_path: Path, words: tuple[str, ...], meta: str | Path
) -> None:
    """`load it: …` is code that works, in the program with that graph."""
    done = tool("run", GRAPH, "-o", f"{tmp_path}/", "--decay", "0.9", *words)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("  load it: ")]
    with tf.Graph().as_default():
        v1.train.import_meta_graph(str(meta), clear_devices=True)
        kernel = v1.convert_to_tensor(v1.trainable_variables()[0])
        ema = v1.train.ExponentialMovingAverage(0.9)
        with session() as active:
            exec(line.removeprefix("  load it: "), {"tf": tf, "ema": ema, "session": active})
            assert same(active.run(kernel), theirs(LAST)[f"conv/kernel/{SHADOW}"])


# ---------------------------------------------------------------------------- from Python


def test_average_run_writes_what_the_command_writes(average: Path, tmp_path: Path) -> None:
    """The same bytes, in the process that also uses TensorFlow."""
    ema_cli.average_run(GRAPH, f"{tmp_path}/", decay=0.9)
    assert files(latest(tmp_path)) == files(latest(average))


def test_the_class_is_tensorflow_s_class(tmp_path: Path) -> None:
    """Its shadows are TensorFlow's, and it asks for the names TensorFlow asks for.

    Under a name of its own, as the checkpoints hold shadows called `ramp` already.
    """
    ema = ema_cli.ExponentialMovingAverage(0.95, "step", name="again", store=tmp_path)
    for step in STEPS:
        ema.apply(GRAPH / f"digits.ckpt-{step}")
    training = theirs(LAST)
    with tf.Graph().as_default():
        v1.train.import_meta_graph(str(EVALUATION))
        real = v1.train.ExponentialMovingAverage(0.95, name="again")
        trainable = [variable.op.name for variable in v1.trainable_variables()]
        asked = {key: v.op.name for key, v in real.variables_to_restore().items()}
    for name in trainable:
        assert ema.average_name(name) == f"{name}/again"
        assert same(np.array(ema.average(name)), training[f"{name}/ramp"])
    mine = ema.variables_to_restore()
    assert asked.items() <= mine.items()

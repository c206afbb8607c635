"""``ema-avg map`` says beforehand whether a restore works: TensorFlow then does the restore."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tensorflow as tf
from support import EVALUATION, SHADOW, differences, latest, restored, session, theirs, tool, v1

import ema_cli

# Builds a program in the default graph; returns its moving average if it has applied one.
Build = Callable[[], Any]
Variables = list[Any]
REFUSED = (tf.errors.NotFoundError, tf.errors.InvalidArgumentError)
FIRST, SECOND = "a.1>b/kernel", "c/kernel"

# ---------------------------------------------------------------------------- programs


def variable(name: str, shape: tuple[int, ...] = (2,), **given: Any) -> Any:
    """Make a variable."""
    return v1.get_variable(name, shape, initializer=v1.zeros_initializer(), **given)


def average(name: str = SHADOW) -> Any:
    """Return a new moving average, which no variable has been given to."""
    return v1.train.ExponentialMovingAverage(0.9, name=name)


def network() -> None:
    """Build two layers, one with batch norm, what no one trains, and a step."""
    variable(FIRST, (2, 3))
    variable(SECOND)
    variable("c/moving_mean", trainable=False)
    variable("scale", (), trainable=False)
    v1.train.get_or_create_global_step()


def larger() -> None:
    """Build a network with a layer more."""
    network()
    variable("d/kernel")


def counting_statistics() -> None:
    """Build a network that counts its statistics among what is averaged."""
    network()
    (statistics,) = [v for v in v1.global_variables() if v.op.name == "c/moving_mean"]
    v1.add_to_collection(v1.GraphKeys.MOVING_AVERAGE_VARIABLES, statistics)


def with_optimizer() -> None:
    """Build a network together with its optimizer."""
    network()
    loss = v1.add_n([v1.reduce_sum(v) for v in v1.trainable_variables()])
    v1.train.MomentumOptimizer(0.1, 0.9).minimize(loss)


def in_parts() -> None:
    """Build a network that cuts a variable."""
    network()
    variable("e/kernel", (4, 3), partitioner=v1.fixed_size_partitioner(2))


def of_half_types() -> None:
    """Build variables of the same names and another dtype."""
    variable(FIRST, (2, 3), dtype=tf.float16)
    variable(SECOND, dtype=tf.float16)


def with_an_integer() -> None:
    """Build a network with a trained integer, which TensorFlow asks for among the averages."""
    network()
    variable("levels", dtype=tf.int32)


def names_alike() -> None:
    """Build variables whose names TensorFlow makes unique: `w_1`, `v_1`."""
    variable("W")
    variable("w")
    v1.Variable([1.0], name="v")
    v1.Variable([2.0], name="v")


def trained() -> Any:
    """Build a network and average it."""
    network()
    ema = average()
    ema.apply()
    return ema


def trained_and_forgotten() -> None:
    """Build a network and average it, as importing its graph does: the object is gone."""
    trained()


def trained_in_part() -> None:
    """Build a network and average one of two layers."""
    network()
    average().apply([v for v in v1.trainable_variables() if v.op.name == SECOND])


def trained_twice() -> None:
    """Build a network with two averages of one name: `_1` makes the second one's shadows unique."""
    trained()
    average().apply()


def trained_in_a_scope() -> None:
    """Build a network and average it within a scope, which the shadows' names begin with."""
    network()
    with v1.variable_scope("scope"):
        average().apply()


# ---------------------------------------------------------------------------- cases

Saved = Callable[[Path], str]


def saved(build: Build, without: str = "\n") -> Saved:
    """Return a function that saves a program, without the variables whose names end so.

    Each variable has a value of its own.
    """

    def save(folder: Path) -> str:
        with tf.Graph().as_default(), session() as active:
            build()
            variables = [v for v in v1.global_variables() if not v.op.name.endswith(without)]
            active.run(v1.global_variables_initializer())
            active.run([v.assign(v1.zeros_like(v) + k) for k, v in enumerate(variables)])
            prefix = str(folder / "model.ckpt-1")
            v1.train.Saver(variables).save(active, prefix, write_state=False)
            return prefix

    return save


def averaged(build: Build, exclude: str = "") -> Saved:
    """Return a function that saves a program, its graph beside it, and averages it."""

    def save(folder: Path) -> str:
        select = [("exclude", exclude)] if exclude else []
        out = str(folder / "average")
        ema_cli.average_run(saved(build)(folder), out, average=["mean"], select=select)
        return out

    return save


class Case(NamedTuple):
    """A restore.

    Attributes:
        saved: writes the checkpoint.
        program: builds the graph that restores.
        works: whether the restore does.
        mended: for the command in the hint, under which names the tensors were saved that the
            restore then gets under others; None where no renaming helps.
        name: of the moving average.
        words: how `map` is told which variables are averaged, if not those of the collections.
        variables: chooses them for TensorFlow.
        scope: in which the program asks for the names.
        forms: by what `map` can know the program: no graph tells the scope in which it asks, nor
            which of two objects asks, and no name tells a dtype.
    """

    saved: Saved
    program: Build
    works: bool
    mended: Mapping[str, str] | None = None
    name: str = SHADOW
    words: tuple[str, ...] = ()
    variables: Callable[[Variables], Variables] | None = None
    scope: str = ""
    forms: tuple[str, ...] = ("graph", "names")


def shadow(variable: str, name: str = SHADOW) -> str:
    """Return what the moving average of a variable is called."""
    return f"{variable}/{name}"


CASES = {
    "an average": Case(averaged(network), network, works=True),
    "a training": Case(saved(trained), network, works=True),
    "a training with two averages": Case(saved(trained_twice), network, works=True),
    "the object that averaged": Case(averaged(trained), trained, works=True),
    "a second object": Case(
        averaged(trained), trained_and_forgotten, works=False, forms=("names",)
    ),
    "names that differ in case": Case(averaged(names_alike), names_alike, works=True),
    "statistics counted": Case(averaged(network), counting_statistics, works=True),
    "a trained integer": Case(averaged(with_an_integer), with_an_integer, works=True),
    "a layer not averaged": Case(averaged(network, exclude=SECOND), network, works=True),
    "a layer is missing": Case(averaged(network), larger, works=False),
    "a cut variable": Case(averaged(in_parts), in_parts, works=False),
    "slots are missing": Case(averaged(with_optimizer), with_optimizer, works=False),
    "another dtype": Case(averaged(network), of_half_types, works=False, forms=("graph",)),
    "weights alone": Case(
        saved(network),
        network,
        works=False,
        mended={shadow(FIRST): FIRST, shadow(SECOND): SECOND},
    ),
    "one layer averaged": Case(
        saved(trained_in_part), network, works=False, mended={shadow(FIRST): FIRST}
    ),
    "the second average alone": Case(
        saved(trained_twice, without=f"/{SHADOW}"),
        network,
        works=False,
        mended={shadow(FIRST): f"{shadow(FIRST)}_1", shadow(SECOND): f"{shadow(SECOND)}_1"},
    ),
    "another name": Case(
        averaged(network),
        network,
        works=False,
        mended={shadow(FIRST, "ema"): shadow(FIRST), shadow(SECOND, "ema"): shadow(SECOND)},
        name="ema",
    ),
    "plain names asked": Case(
        averaged(network),
        network,
        works=False,
        mended={FIRST: shadow(FIRST), SECOND: shadow(SECOND)},
        words=("--exclude", "*"),
        variables=lambda _: [],
    ),
    "one plain name asked": Case(
        averaged(network),
        network,
        works=False,
        mended={FIRST: shadow(FIRST)},
        words=("--exclude", FIRST),
        variables=lambda found: [v for v in found if v.op.name != FIRST],
    ),
    "a scope, asked for within it": Case(
        saved(trained_in_a_scope), network, works=True, scope="scope", forms=("names",)
    ),
    "a scope, averaged outside": Case(
        averaged(network),
        network,
        works=False,
        mended={f"scope/{shadow(one)}": shadow(one) for one in (FIRST, SECOND)},
        scope="scope",
        forms=("names",),
    ),
}


class Program(NamedTuple):
    """A program by its graph and by the names it asks for, which lead to its variables."""

    graph: Path
    names: Path
    asked: Mapping[str, Any]

    def outcome(self, prefix: str) -> dict[str, Any] | None:
        """Return what TensorFlow restores, or None when it refuses."""
        try:
            return restored(prefix, self.asked)
        except REFUSED:
            return None


def programmed(case: Case, folder: Path) -> Program:
    """Build the program in the default graph, and write down what it asks for."""
    graph, names = folder / "evaluation.meta", folder / "names"
    ema = case.program() or average(case.name)
    v1.train.export_meta_graph(str(graph))
    choose = case.variables
    chosen = None if choose is None else choose(v1.trainable_variables())
    if case.scope:
        with v1.variable_scope(case.scope):
            asked = ema.variables_to_restore(chosen)
    else:
        asked = ema.variables_to_restore(chosen)
    names.write_text("\n".join(asked))
    return Program(graph, names, asked)


def follow(hint: str, out: Path) -> None:
    """Run the command of a hint, with `out` for OUT."""
    program, *words = shlex.split(hint)
    assert program == "ema-avg", f"no command: {hint}"
    tool(*[str(out) if word == "OUT" else word for word in words])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that gives the checkpoint of a case, which it writes once."""

    @functools.cache
    def written(name: str) -> str:
        return CASES[name].saved(tmp_path_factory.mktemp("saved"))

    return written


TOLD = [(name, form) for name, case in CASES.items() for form in case.forms]


@pytest.mark.parametrize("name, form", TOLD, ids=[f"{name}, {form}" for name, form in TOLD])
def test_the_exit_code_is_the_outcome_of_the_restore(
    tmp_path: Path, checkpoint: Callable[[str], str], name: str, form: str
) -> None:
    """0 where TensorFlow restores, 13 where it refuses; then the hint's command mends it.

    The program is told to `map` as its graph and as the names it asks for.
    """
    case, prefix = CASES[name], checkpoint(name)
    with tf.Graph().as_default():
        program = programmed(case, tmp_path)
        assert (program.outcome(prefix) is not None) is case.works
        told: tuple[str | Path, ...] = ("--for", program.names)
        if form == "graph":
            told = ("--for", program.graph, *case.words)
        words = (*told, "--name", case.name)
        done = tool("map", prefix, *words, code=0 if case.works else 13)
        if case.mended is None:
            assert case.works or "ema-avg rename" not in done.stderr
            return
        (hint,) = [line for line in done.stderr.splitlines() if line.startswith("hint: ")]
        follow(hint.removeprefix("hint: "), tmp_path / "mended")
        tool("map", tmp_path / "mended", *words)
        found = program.outcome(str(tmp_path / "mended"))
    assert found is not None
    before = theirs(prefix)
    expected = {name: before[case.mended.get(name, name)] for name in found}
    assert differences(found, expected) == []


def test_the_printed_code_restores(average: Path) -> None:
    """`map --python`: the code runs in the program's graph, and its Saver restores."""
    done = tool("map", average, "--for", EVALUATION, "--python")
    with tf.Graph().as_default():
        v1.train.import_meta_graph(str(EVALUATION))
        scope: dict[str, Any] = {}
        exec(done.stdout, scope)
        values = {
            k: v1.convert_to_tensor(scope["variables"][v]) for k, v in scope["RESTORE_MAP"].items()
        }
        with session() as active:
            scope["saver"].restore(active, latest(average))
            found = active.run(values)
    saved = theirs(latest(average))
    assert len(found) == 10
    assert differences(found, {name: saved[name] for name in found}) == []

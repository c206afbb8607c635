"""How a plan is shown: the checkpoints with their weights, the tensors, the costs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ema_cli.cli import plotview
from ema_cli.naming import OBJECT_GRAPH, SHADOW_NAME, role_in
from ema_cli.record import copied
from ema_cli.tensors import Role
from ema_cli.text import command, percent, plural, printable, shorten, size
from ema_cli.views import Out

if TYPE_CHECKING:
    from ema_cli.blueprint import Layout
    from ema_cli.plan import Outcome, Plan
    from ema_cli.running import Written
    from ema_cli.runs import Run


# More entries passed over for one reason are counted; -v lists them.
MANY = 5
RAMP = (
    "no average was asked for: --decay 0.999 --num-updates count, TensorFlow's ramp "
    "min(0.999, (1+n)/(10+n)); the ramp decides"
)
BATCH_NORM = (
    "batch-norm statistics are averaged too; with training data at hand, recompute them "
    "(torch.optim.swa_utils.update_bn)"
)
LOAD = "safetensors.numpy.load_file({})"
PLAIN_BATCH_NORM = "batch-norm statistics are averaged too (--statistics copy takes the last)"
KERAS_BATCH_NORM = (
    "batch-norm statistics are averaged too (--statistics copy takes the last, as Keras does)"
)
TENSORFLOW_BATCH_NORM = (
    "batch-norm statistics are averaged too (--statistics copy takes the last, as TensorFlow does)"
)


def passed_over(out: Out, run: Run) -> None:
    """Tell every entry that was not taken, and what was odd about those that were."""
    for note in run.notes:
        out.say(f"note: {note}")
    repeated = Counter(entry.reason for entry in run.passed_over if not entry.unusable)
    for entry in run.passed_over:
        word = "unusable" if entry.unusable else "passed over"
        line = f"{word}: {shorten(entry.path, 1000)}: {entry.reason}"
        if entry.unusable or repeated[entry.reason] <= MANY:
            out.say(line)
        else:
            out.detail(line)
    for reason, count in repeated.items():
        if count > MANY and not out.verbose:
            out.say(f"passed over: {count:,} entries: {reason}")


def show(out: Out, plan: Plan) -> None:
    """Print the plan."""
    checkpoints = plan.run.checkpoints
    steps = plan.run.steps
    span = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    where = f"{shorten(plan.request.paths[0], 1000)}: " if plan.run.searched else ""
    out.line(f"{where}{plural(len(checkpoints), 'checkpoint')}, {span}")
    if plan.request.implicit:
        out.line(RAMP)
    out.line()
    plotview.show(out, plotview.of_plan(plan))
    out.line()
    for outcome in plan.outcomes:
        _outcome(out, plan, outcome)
    costs = plan.costs
    if costs.spill:
        out.line(f"unpacks {size(costs.spill)} to a temporary file first")
    out.line(
        f"reads {size(costs.read)}, writes {size(costs.write)}; disk {size(costs.write)} of "
        f"{size(costs.free)} free, memory about {size(costs.memory)}"
    )


def _outcome(out: Out, plan: Plan, outcome: Outcome) -> None:
    weights, layout = outcome.weights, outcome.layout
    total = sum(weights)
    sums = "" if abs(total - 1) < 1e-6 else f", the weights sum to {total:.6g}"
    worth = plotview.extent(weights, plan.run.steps)
    out.line(f"{outcome.average.label}: {outcome.average.spec}: {worth}{sums}")
    if layout.path:
        out.line(f"  to {shorten(layout.path, 1000)}")
    kind = "the last checkpoint's own layout" if layout.template else "a new layout"
    out.line(f"  as {layout.format}, {layout.names} names, {kind}")
    _tensors(out, outcome)
    for note in layout.notes:
        out.line(f"  {note}")
    weights_files = {stamp.path for stamp in outcome.last.files}
    for file in layout.files:
        if file.copy_of and file.copy_of not in weights_files:
            out.line(f"  beside the weights: {shorten(file.name)}")


def _tensors(out: Out, outcome: Outcome) -> None:
    """Count what is averaged, copied and left out, with each reason."""
    selection = outcome.selection
    nbytes = sum(tensor.nbytes for tensor in selection.averaged)
    out.line(f"  averaged: {plural(len(selection.averaged), 'tensor')}, {size(nbytes)}")
    if outcome.last.index.roles_from:
        out.line(f"  variables told by {outcome.last.index.roles_from}")
    copies = copied(outcome)
    left_out = dict(outcome.layout.left_out)
    if _statistics(outcome):
        out.line(f"  {_batch_norm(outcome)}")
    _counted(out, "copied", Counter(reason for _, reason in copies))
    _counted(out, "left out", Counter(left_out.values()))
    optimizer = sum(tensor.nbytes for tensor in selection.optimizer)
    if optimizer:
        word = "left out" if selection.optimizer[0].name in left_out else "kept"
        out.line(f"  optimizer state {word}: {size(optimizer)} (--optimizer keep or drop)")
    for name, reason in copies:
        out.detail(f"copied: {shorten(name)}: {reason}")
    for name, reason in left_out.items():
        out.detail(f"left out: {shorten(name)}: {reason}")


def _statistics(outcome: Outcome) -> bool:
    """Whether batch-norm statistics are averaged."""
    index = outcome.last.index
    averaged = outcome.selection.averaged
    return any(role_in(index, tensor.name, SHADOW_NAME) is Role.STATISTICS for tensor in averaged)


def _batch_norm(outcome: Outcome) -> str:
    texts = {
        "tensorflow": TENSORFLOW_BATCH_NORM,
        "keras": KERAS_BATCH_NORM,
        "hdf5": KERAS_BATCH_NORM,
        "npz": PLAIN_BATCH_NORM,
    }
    return texts.get(outcome.last.index.format, BATCH_NORM)


def _counted(out: Out, word: str, reasons: Counter[str]) -> None:
    for reason, count in reasons.items():
        out.line(f"  {word}: {plural(count, 'tensor')} ({reason})")


def loading(outcome: Outcome) -> str:
    """Return the command or line of code that loads an output."""
    path, layout = outcome.layout.path, outcome.layout
    if layout.kind == "folder" and layout.names == "variable":
        names = [file.name for file in layout.files]
        if "config.json" not in names:
            weights = os.path.join(path, names[0])
            call = "torch.load({}, weights_only=True)" if layout.format == "torch-folder" else LOAD
            return call.format(f"{shorten(weights, 1000)!r}")
        return f"AutoModel.from_pretrained({shorten(path, 1000)!r})"
    if layout.kind == "prefix":
        return _restoring(layout)
    if layout.names == "shadow":
        return command("ema-avg", "map", path)
    return _call(outcome).format(f"{shorten(path, 1000)!r}")


def _call(outcome: Outcome) -> str:
    """Return the line of code that loads a single file, with ``{}`` for its path."""
    from ema_cli.formats.hdf5.names import keras_layout

    layout = outcome.layout
    kind = keras_layout(layout.places, "keras_version" in outcome.last.index.metadata)
    keras = {
        "": "h5py.File({})",
        "whole model": "keras.saving.load_model({})",
        "older weights": "model.load_weights({})",
        "keras 3": "model.load_weights({})",
    }
    plain = not any("weights_only=False" in note for note in layout.notes)
    calls = {
        "torch": f"torch.load({{}}, weights_only={plain})",
        "keras": "keras.saving.load_model({})",
        "hdf5": keras[kind],
        "npz": "numpy.load({})",
    }
    return calls.get(layout.format, LOAD)


def _restoring(layout: Layout) -> str:
    """Return the line of TensorFlow that restores an output."""
    path = f"{shorten(layout.path, 1000)!r}"
    if OBJECT_GRAPH in layout.places:
        return f"tf.train.Checkpoint(...).restore({path})"
    variables = "ema.variables_to_restore()" if layout.names == "shadow" else ""
    return f"tf.compat.v1.train.Saver({variables}).restore(session, {path})"


def written(out: Out, plan: Plan, outcome: Outcome, one: Written) -> None:
    """Tell what became of one output, its path last."""
    if one.status == "written":
        summary(out, plan, outcome)
    out.line(f"{one.status}  {size(one.nbytes)}  {printable(one.path)}")


def output(one: Written) -> dict[str, Any]:
    """Return what became of one output as JSON data."""
    return {"path": one.path, "status": one.status, "bytes": one.nbytes}


def summary(out: Out, plan: Plan, outcome: Outcome) -> None:
    """Tell on stderr what one finished output is made of."""
    weights: Sequence[float] = outcome.weights
    used = [k for k, weight in enumerate(weights) if weight]
    first, last = used[0], used[-1]
    if len(used) == 1:
        out.say(f"{outcome.average.label}: one checkpoint, step {plan.run.steps[first]:,}")
    else:
        out.say(
            f"{outcome.average.label}: {len(used):,} checkpoints averaged, weights "
            f"{percent(weights[first])} (step {plan.run.steps[first]:,}) to "
            f"{percent(weights[last])} (step {plan.run.steps[last]:,})"
        )
        out.say(f"  {plotview.extent(weights, plan.run.steps)}")
    for k in used:
        path = shorten(plan.run.checkpoints[k].path, 1000)
        out.detail(f"  used: {path} (step {plan.run.steps[k]:,}): {percent(weights[k])}")
    selection = outcome.selection
    entries = {entry.source for entry in outcome.layout.entries if entry.part == "copy"}
    out.say(
        f"  {plural(len(selection.averaged), 'tensor')} averaged, {len(entries):,} copied, "
        f"{len(outcome.layout.left_out):,} left out"
    )
    for name, reason in copied(outcome):
        out.detail(f"  copied: {shorten(name)}: {reason}")
    for name, reason in outcome.layout.left_out:
        out.detail(f"  left out: {shorten(name)}: {reason}")
    if _statistics(outcome):
        out.say(f"  {_batch_norm(outcome)}")
    checked = outcome.layout.names == "shadow" and outcome.layout.kind != "prefix"
    verb = "check it" if checked else "load it"
    out.say(f"  {verb}: {loading(outcome)}")

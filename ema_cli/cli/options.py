"""The options commands share, in the groups their help shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ema_cli.cli.command import Option
from ema_cli.cli.configuration import configure
from ema_cli.views import Out

F = TypeVar("F", bound=Callable[..., Any])

AVERAGED = ("float16", "bfloat16", "float32", "float64")


def _apply(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _option(group: str, *names: str, **kwargs: Any) -> Callable[[F], F]:
    return click.option(*names, cls=Option, group=group, **kwargs)


common_options = _apply(
    [
        _option("Common", "--json", is_flag=True, help="JSON on stdout."),
        _option("Common", "-q", "--quiet", is_flag=True, help="Errors only on stderr."),
        _option("Common", "-v", "--verbose", is_flag=True, help="Say more on stderr."),
        _option("Common", "--no-color", is_flag=True, help="No styles; NO_COLOR does the same."),
        _option(
            "Common",
            "--config",
            type=click.Path(),
            is_eager=True,
            expose_value=False,
            callback=configure,
            help="Defaults from a TOML file, a table per command; EMA_AVG_RUN_DECAY and "
            "the like come before it.",
        ),
    ]
)


def way_out(given: dict[str, Any]) -> Out:
    """Take the common options out of a command's arguments; returns its way to the user."""
    return Out(
        as_json=given.pop("json"),
        quiet=given.pop("quiet"),
        verbose=given.pop("verbose"),
        color=not given.pop("no_color"),
    )


strict_option = _option(
    "Common", "--strict", is_flag=True, help="Treat warnings and unusable entries as errors."
)


def select_options(include: str, exclude: str) -> Callable[[F], F]:
    """Return ``--include`` and ``--exclude`` with what they mean to a command."""
    texts = {"--include": include, "--exclude": exclude}
    return _apply(
        [
            _option("Average", option, multiple=True, metavar="GLOB", help=text)
            for option, text in texts.items()
        ]
    )


name_option = _option(
    "TensorFlow compatibility",
    "--name",
    default="ExponentialMovingAverage",
    show_default=True,
    help="Name of the shadows: <variable>/NAME.",
)

key_option = _option(
    "Input",
    "--key",
    metavar="PATH",
    help="Where the model is inside a checkpoint that holds more, e.g. state/model.",
)
input_options = _apply(
    [
        _option("Input", "--glob", metavar="GLOB", help="Entries to consider; may contain '/'."),
        _option("Input", "--last", type=int, metavar="N", help="Only the newest N checkpoints."),
        _option(
            "Input",
            "--steps",
            metavar="A:B[:C]",
            help="Only steps A to B; with C, where C divides step - A.",
        ),
        _option(
            "Input", "--step-from", metavar="REGEX", help="The step in a name: the first group."
        ),
        _option(
            "Input",
            "--order",
            type=click.Choice(("step", "given")),
            default="step",
            show_default=True,
            help="Order of checkpoints that are named one by one.",
        ),
        key_option,
    ]
)

non_finite_option = _option(
    "Average",
    "--non-finite",
    type=click.Choice(("error", "allow")),
    default="error",
    show_default=True,
    help="What NaN or infinity in the result is.",
)

average_options = _apply(
    [
        _option(
            "Average",
            "--decay",
            metavar="D[/step]",
            help="Exponential average: decay per checkpoint, or per training step.",
        ),
        _option(
            "Average",
            "--average",
            multiple=True,
            metavar="[LABEL=]SPEC[@WINDOW]",
            help="ema:D[/step], half-life:STEPS, mean, lr:{linear,cosine,1-sqrt}, "
            "power:SIGMA_REL or weights:FILE; WINDOW is last=N or A:B in steps. "
            "lr:linear is the mean.",
        ),
        _option(
            "Average",
            "--num-updates",
            type=click.Choice(("none", "count", "step")),
            help="Ramp min(D, (1+n)/(10+n)): n counts updates, or is the step.  [default: none]",
        ),
        select_options(
            "Average these tensors too; the last match of both options wins.",
            "Copy these tensors from the last checkpoint.",
        ),
        _option(
            "TensorFlow compatibility",
            "--init",
            type=click.Choice(("first", "zeros")),
            default="first",
            show_default=True,
            help="Start from the first checkpoint or from zeros.",
        ),
        _option(
            "TensorFlow compatibility",
            "--zero-debias",
            is_flag=True,
            help="Divide by TensorFlow's bias factor; implies zeros.",
        ),
        name_option,
        _option(
            "TensorFlow compatibility",
            "--statistics",
            type=click.Choice(("average", "copy")),
            help="Batch-norm statistics; the frameworks copy them.  [default: average, or copy "
            "with --like]",
        ),
        _option(
            "TensorFlow compatibility",
            "--shadow-dtype",
            type=click.Choice(("auto", "same")),
            default="auto",
            show_default=True,
            help="Accumulate half types in float32, or in themselves as TensorFlow does.",
        ),
        _option(
            "Average",
            "--like",
            type=click.Choice(("tensorflow", "torch", "keras")),
            default="tensorflow",
            show_default=True,
            help="Whose arithmetic: torch as AveragedModel, keras as use_ema, bit for bit.",
        ),
        non_finite_option,
    ]
)

format_option = _option(
    "Output", "--format", metavar="FORMAT", help="Format, if not told by the suffix or the input."
)
overwrite_option = _option(
    "Output", "--overwrite", is_flag=True, help="Replace an existing output."
)
restart_option = _option(
    "Output",
    "--restart",
    is_flag=True,
    help="Start over instead of continuing what an interrupted run left.",
)
rule_option = _option(
    "Output",
    "--rule",
    nargs=2,
    multiple=True,
    metavar="PATTERN REPL",
    help="Regular expression replaced in output names.",
)
workers_option = _option(
    "Resources",
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads; default from affinity and cgroup limits.",
)

look_options = _apply(
    [
        _option(
            "Output",
            "--names",
            type=click.Choice(("auto", "shadow", "variable")),
            default="auto",
            show_default=True,
            help="<variable>/NAME, or plain names ready to load.",
        ),
        rule_option,
        _option(
            "Output",
            "--dtype",
            type=click.Choice(AVERAGED),
            help="Of averaged tensors; default their own.",
        ),
        format_option,
        _option("Output", "--max-shard-size", metavar="SIZE", help="E.g. 5GB; for new folders."),
        _option(
            "Output",
            "--optimizer",
            type=click.Choice(("auto", "keep", "drop")),
            default="auto",
            show_default=True,
            help="Optimizer state: auto keeps it when names stay.",
        ),
        _option(
            "Output",
            "--unknown",
            type=click.Choice(("refuse", "keep", "drop")),
            default="refuse",
            show_default=True,
            help="Objects in a PyTorch pickle that are neither tensors nor plain data.",
        ),
    ]
)

output_options = _apply(
    [
        _option(
            "Output",
            "--keep-variables",
            is_flag=True,
            help="Also write the last raw values beside the shadows.",
        ),
        look_options,
    ]
)

state_option = _option(
    "Input",
    "--state",
    metavar="DIR",
    type=click.Path(),
    help="Keep the shadows in DIR and mix in what is new; begun if it is not there.",
)


def debugging() -> bool:
    """Whether tracebacks were asked for."""
    return os.environ.get("EMA_AVG_DEBUG", "") not in ("", "0")

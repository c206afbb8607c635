"""The options commands share, in the groups their help shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ema_cli.cli import completion
from ema_cli.cli.command import Option
from ema_cli.cli.configuration import configure, unknown_variables
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
        _option(
            "Common", "--json", is_flag=True, help="Answer in JSON on stdout, one document a line."
        ),
        _option("Common", "-q", "--quiet", is_flag=True, help="Say nothing but errors on stderr."),
        _option("Common", "-v", "--verbose", is_flag=True, help="Say more on stderr."),
        _option(
            "Common",
            "--no-color",
            is_flag=True,
            help="No colors or styles; NO_COLOR does the same.",
        ),
        _option(
            "Common",
            "--config",
            type=click.Path(),
            is_eager=True,
            expose_value=False,
            callback=configure,
            metavar="FILE.toml",
            help="Defaults for options, a table for each command; see ema-avg --help.",
        ),
    ]
)


def way_out(given: dict[str, Any]) -> Out:
    """Take the common options out of a command's arguments; returns its way to the user."""
    out = Out(
        as_json=given.pop("json"),
        quiet=given.pop("quiet"),
        verbose=given.pop("verbose"),
        color=not given.pop("no_color"),
    )
    for message, hint in unknown_variables(click.get_current_context()):
        out.warning("unknown-variable", message, hint)
    return out


strict_option = _option(
    "Common", "--strict", is_flag=True, help="Treat warnings and unusable entries as errors."
)


def select_options(include: str, exclude: str) -> Callable[[F], F]:
    """Return ``--include`` and ``--exclude`` with what they mean to a command."""
    texts = {"--include": include, "--exclude": exclude}
    return _apply(
        [
            _option(
                "Average",
                option,
                multiple=True,
                metavar="GLOB",
                shell_complete=completion.tensors,
                help=text,
            )
            for option, text in texts.items()
        ]
    )


name_option = _option(
    "TensorFlow compatibility",
    "--name",
    default="ExponentialMovingAverage",
    show_default=True,
    help="What shadows are called: <variable>/NAME.",
)

key_option = _option(
    "Input",
    "--key",
    metavar="PATH",
    shell_complete=completion.keys,
    help="Where the model is inside a checkpoint that holds more, e.g. state/model.",
)
from_option = _option(
    "Input",
    "--from",
    "provenance",
    metavar="OUT.ema.json",
    type=click.Path(),
    allow_from_autoenv=False,
    shell_complete=completion.provenances,
    help="Average once more, and in the same way, what OUT was made of; instead of RUN and all "
    "other options of Input and Average.",
)
input_options = _apply(
    [
        _option(
            "Input", "--glob", metavar="GLOB", help="Entries of RUN to consider; may contain '/'."
        ),
        _option("Input", "--last", type=int, metavar="N", help="Only the newest N checkpoints."),
        _option(
            "Input",
            "--steps",
            metavar="A:B[:C]",
            help="Only steps A to B, both included; with C only A, A + C, A + 2C and so on.",
        ),
        _option(
            "Input",
            "--step-from",
            metavar="REGEX",
            help="How a name tells the step: the first group is it.",
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
    help="What is done about NaN or infinity in the result.",
)

average_options = _apply(
    [
        _option(
            "Average",
            "--decay",
            metavar="D[/step]",
            shell_complete=completion.decays,
            help="Exponential average with this decay per checkpoint, or per training step.",
        ),
        _option(
            "Average",
            "--average",
            multiple=True,
            metavar="[LABEL=]SPEC[@WINDOW]",
            shell_complete=completion.averages,
            help="An average, or several with several of these. SPEC is ema:D[/step], "
            "half-life:STEPS, mean, lr:{linear,cosine,1-sqrt}, power:SIGMA_REL or weights:FILE; "
            "WINDOW is last=N or A:B in steps. lr:linear is the mean.",
        ),
        _option(
            "Average",
            "--num-updates",
            type=click.Choice(("none", "count", "step")),
            help="Lower the decay at first to min(D, (1+n)/(10+n)), where n counts updates or is "
            "the step.  [default: none]",
        ),
        select_options(
            "Average tensors that match; of both options the last match wins.",
            "Copy tensors that match from the last checkpoint.",
        ),
        _option(
            "TensorFlow compatibility",
            "--init",
            type=click.Choice(("first", "zeros")),
            default="first",
            show_default=True,
            help="Begin with the first checkpoint or with zeros.",
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
            help="Average batch-norm statistics, or copy the last ones as the frameworks do.  "
            "[default: average, or copy with --like]",
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
            help="Whose arithmetic, bit for bit: torch is that of AveragedModel, keras of use_ema.",
        ),
        non_finite_option,
    ]
)

stats_options = _apply(
    [
        _option(
            "Average",
            "--stats",
            is_flag=True,
            help="Tell how far each checkpoint lies from the average before it, and warn of "
            "outliers.",
        ),
        _option(
            "Average",
            "--outliers",
            type=click.Choice(("warn", "error")),
            help="What a checkpoint is that does not seem to belong; implies --stats.  "
            "[default: warn]",
        ),
    ]
)

format_option = _option(
    "Output",
    "--format",
    metavar="FORMAT",
    shell_complete=completion.format_names,
    help="Of the output.  [default: what its suffix tells, or that of the input]",
)
plot_option = _option(
    "Output",
    "--plot",
    metavar="FILE.svg",
    type=click.Path(),
    shell_complete=completion.paths,
    help="Also draw weights, coefficients and, of a run, the drift of each group of tensors.",
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
    help="Replace a regular expression in the names of the output; may be repeated.",
)
workers_option = _option(
    "Resources",
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads; all cores this process may use without it.",
)

look_options = _apply(
    [
        _option(
            "Output",
            "--names",
            type=click.Choice(("auto", "shadow", "variable")),
            default="auto",
            show_default=True,
            help="Averaged tensors are called <variable>/NAME, or as the variables: ready to load.",
        ),
        rule_option,
        _option(
            "Output",
            "--dtype",
            type=click.Choice(AVERAGED),
            help="Of averaged tensors in the output.  [default: their own]",
        ),
        format_option,
        _option(
            "Output",
            "--max-shard-size",
            metavar="SIZE",
            help="Most bytes of one file of a new folder, e.g. 5GB.",
        ),
        _option(
            "Output",
            "--optimizer",
            type=click.Choice(("auto", "keep", "drop")),
            default="auto",
            show_default=True,
            help="Optimizer state; auto keeps it where the names stay.",
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
    shell_complete=completion.directories,
    help="Keep the shadows in DIR, and mix in only what is new; begun if it is not there.",
)


def debugging() -> bool:
    """Whether tracebacks were asked for."""
    return os.environ.get("EMA_AVG_DEBUG", "") not in ("", "0")

"""Which tensors are averaged, copied from the last checkpoint, or left out, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ema_cli.errors import Disagreement, NothingToAverage, UnsupportedInput
from ema_cli.formats import FORMATS
from ema_cli.hints import excluding
from ema_cli.naming import Rule, check_rules, role_in, ruling, variable_behind
from ema_cli.tensors import Checkpoint, DType, Index, Role, Tensor, describe
from ema_cli.text import near_misses, shorten, with_article

STATISTICS = ("average", "copy")

# Tensors that scale packed or 8 bit weights beside them: compressed-tensors and FP8 checkpoints,
# GPTQ and AWQ, bitsandbytes.
_SCALES = re.compile(
    r"(.*?)(?:[._](?:weight_scale(?:_inv)?|scale|scales|qzeros|SCB)|\.(?:absmax|quant_map))",
    re.DOTALL,
)


class Choice(NamedTuple):
    """A tensor with what happens to it and why."""

    tensor: Tensor
    action: str
    reason: str


AVERAGED = "averaged"
COPIED = "copied"
OPTIMIZER = "optimizer"
BESIDE = "beside"
REPLACED = "replaced"


@dataclass(frozen=True, eq=False)
class Selection:
    """What happens to every tensor of one index.

    Attributes:
        averaged: variables and statistics, in the order of their bytes.
        copied: taken bit for bit from the last checkpoint, each with its reason.
        optimizer: optimizer state, kept or dropped with the layout.
        replaced: shadows of our own name, which the result replaces.
        beside: what stands beside the model, kept or dropped with the layout.
    """

    averaged: tuple[Tensor, ...]
    copied: tuple[Choice, ...]
    optimizer: tuple[Tensor, ...]
    replaced: tuple[Tensor, ...]
    beside: tuple[Tensor, ...] = ()


def select(
    index: Index, rules: Sequence[Rule], statistics: str, name: str, where: str = ""
) -> Selection:
    """Return what happens to each tensor of `index`; `name` is that of the shadows.

    `where` begins the messages, e.g. ``"PATH: "``.

    Raises `Disagreement` for a rule that asks for what cannot be averaged, `UnsupportedInput`
    for quantised models, `NothingToAverage` when no tensor is averaged.
    """
    _refuse_named(rules, index)
    choices = [_choose(index, tensor, rules, statistics, name) for tensor in index.tensors]
    choices = _replace_shadows(choices, index, name)
    _refuse_quantized(choices, index, where)

    def taken(action: str) -> tuple[Tensor, ...]:
        return tuple(choice.tensor for choice in choices if choice.action == action)

    if not taken(AVERAGED):
        raise NothingToAverage(
            f"{where}none of the {len(index.tensors):,} tensors is averaged",
            "see what they are with ema-avg inspect, and choose some with --include 'GLOB'",
        )
    copied = tuple(choice for choice in choices if choice.action == COPIED)
    return Selection(taken(AVERAGED), copied, taken(OPTIMIZER), taken(REPLACED), taken(BESIDE))


def check_rules_of(rules: Sequence[Rule], indexes: Iterable[Index]) -> None:
    """Raise `Disagreement` for a rule that matches no tensor of any of the checkpoints."""
    if rules:
        check_rules(rules, {name for index in indexes for name in index.by_name})


def _replace_shadows(choices: list[Choice], index: Index, name: str) -> list[Choice]:
    """Our own shadows of averaged variables are replaced, whatever a wildcard says of them.

    That of a variable which is not averaged stays what it was.
    """
    averaged = {choice.tensor.name for choice in choices if choice.action == AVERAGED}

    def replaced(choice: Choice) -> Choice:
        tensor = choice.tensor
        base = tensor.name.removesuffix("/biased").removesuffix("/local_step")
        shadow = tensor if base == tensor.name else tensor._replace(name=base)
        variable = variable_behind(shadow, name, index.by_name)
        if variable in averaged:
            return Choice(tensor, REPLACED, "replaced by this average")
        if choice.action == REPLACED:
            return Choice(tensor, COPIED, "its variable is not averaged")
        return choice

    return [replaced(choice) for choice in choices]


def _choose(
    index: Index, tensor: Tensor, rules: Sequence[Rule], statistics: str, name: str
) -> Choice:
    role = role_in(index, tensor.name, name)
    rule = ruling(rules, tensor.name)
    if not tensor.dtype.averaged:
        return _choose_exact(tensor, role, rule)
    if rule is not None:
        return Choice(tensor, AVERAGED if rule.include else COPIED, rule.option)
    match role:
        case Role.VARIABLE:
            return Choice(tensor, AVERAGED, role.value)
        case Role.STATISTICS if statistics == "average":
            return Choice(tensor, AVERAGED, role.value)
        case Role.STATISTICS:
            return Choice(tensor, COPIED, "--statistics copy")
        case Role.OPTIMIZER:
            return Choice(tensor, OPTIMIZER, role.value)
        case Role.BESIDE:
            return Choice(tensor, BESIDE, role.value)
        case Role.SHADOW:
            return Choice(tensor, REPLACED, "replaced by this average")
        case _:
            return Choice(tensor, COPIED, role.value)


def _choose_exact(tensor: Tensor, role: Role, rule: Rule | None) -> Choice:
    """Choose for a dtype that is never averaged."""
    if role in (Role.OPTIMIZER, Role.BESIDE) and rule is None:
        return Choice(tensor, OPTIMIZER if role is Role.OPTIMIZER else BESIDE, role.value)
    excluded = rule is not None and not rule.include
    if tensor.dtype.floating and not excluded:
        return Choice(tensor, "refused", "")
    return Choice(tensor, COPIED, f"{tensor.dtype} is never averaged")


def _refuse_named(rules: Sequence[Rule], index: Index) -> None:
    """An integer variable that is named without a wildcard was meant: TensorFlow's TypeError."""
    for rule in rules:
        tensor = index.by_name.get(rule.pattern)
        if rule.include and tensor is not None and not tensor.dtype.averaged:
            raise Disagreement(
                f"{rule.option}: expected float16, bfloat16, float32 or float64, "
                f"found {tensor.dtype}",
                "leave it out: integers and the like are copied from the last checkpoint",
            )


def _refuse_quantized(choices: Iterable[Choice], index: Index, where: str) -> None:
    for tensor in index.tensors:
        match = _SCALES.fullmatch(tensor.name)
        packed = match and _packed_beside(match[1], index)
        if packed:
            raise UnsupportedInput(
                f"{where}the model is quantised: '{shorten(tensor.name)}' scales "
                f"'{shorten(packed.name)}' ({packed.dtype}), and an average of quantised numbers "
                "is none",
                "dequantise the checkpoints first, then average the result",
            )
    refused = next((choice.tensor for choice in choices if choice.action == "refused"), None)
    if refused is not None:
        raise UnsupportedInput(
            f"{where}tensor '{shorten(refused.name)}': expected float16, bfloat16, float32 or "
            f"float64, found {refused.dtype}",
            f"copy it from the last checkpoint: {excluding(refused.name)}",
        )


def _packed_beside(stem: str, index: Index) -> Tensor | None:
    """Return the packed weight that a scale called `stem` + suffix belongs to, if there is one."""
    for name in (stem, *(f"{stem}{word}" for word in (".weight", ".qweight", ".weight_packed"))):
        tensor = index.by_name.get(name)
        if tensor is not None and not tensor.dtype.averaged:
            return tensor
    return None


def check_agreement(
    selection: Selection,
    last: Checkpoint,
    others: Iterable[Checkpoint],
    rules: Sequence[Rule],
    statistics: str,
    name: str,
) -> None:
    """Raise `Disagreement` unless all checkpoints hold the same averaged tensors.

    Same names, shapes and dtypes; names the checkpoint, the tensor, what was expected and found.
    """
    wanted = {t.name: (t.dtype, t.shape) for t in selection.averaged}
    checked = {id(last.index)}
    for checkpoint in others:
        if id(checkpoint.index) in checked:
            continue
        checked.add(id(checkpoint.index))
        where = shorten(checkpoint.path, 1000)
        _check_format(where, checkpoint.index, last, wanted)
        for tensor_name in wanted:
            _check_tensor(where, tensor_name, wanted, checkpoint.index)
            _check_full_name(where, tensor_name, last.index, checkpoint.index)
        for tensor in checkpoint.index.tensors:
            if tensor.name in wanted or tensor.name in last.index.by_name:
                continue
            if _choose(checkpoint.index, tensor, rules, statistics, name).action == AVERAGED:
                raise Disagreement(
                    f"{shorten(last.path, 1000)}: tensor '{shorten(tensor.name)}' is missing: "
                    f"{where} has {describe(tensor.dtype, tensor.shape)}",
                    _exclude_hint(tensor.name),
                )


def _check_format(where: str, index: Index, last: Checkpoint, wanted: Iterable[str]) -> None:
    """Say so when tensors are missing because another format calls them otherwise."""
    if index.format != last.index.format and not all(name in index.by_name for name in wanted):
        titles = [with_article(FORMATS[one.format].title) for one in (index, last.index)]
        raise Disagreement(
            f"{where}: {titles[0]} with other tensors than {shorten(last.path, 1000)}, {titles[1]}",
            "choose those of one format with --glob",
        )


def _check_tensor(
    where: str, name: str, wanted: Mapping[str, tuple[DType, tuple[int, ...]]], index: Index
) -> None:
    tensor, expected = index.by_name.get(name), wanted[name]
    shown = describe(*expected)
    if tensor is None:
        close = near_misses(name, [other for other in index.by_name if other not in wanted])
        found = f"; it has '{shorten(close[0])}'" if close else ""
        raise Disagreement(
            f"{where}: tensor '{shorten(name)}' is missing: expected {shown}{found}",
            _exclude_hint(name),
        )
    if (tensor.dtype, tensor.shape) != expected:
        raise Disagreement(
            f"{where}: tensor '{shorten(name)}': expected {shown} as in the last checkpoint, "
            f"found {describe(tensor.dtype, tensor.shape)}",
            _exclude_hint(name),
        )


def _check_full_name(where: str, name: str, last: Index, other: Index) -> None:
    """Keras numbers the variables of an export in any order: one key, another variable."""
    if (name in last.negated) != (name in other.negated):
        raise Disagreement(
            f"{where}: tensor '{shorten(name)}': its negative is stored in one checkpoint and not "
            "in another",
            "save it again as tensor.resolve_neg()",
        )
    expected, found = last.full_names.get(name), other.full_names.get(name)
    if expected != found:
        raise Disagreement(
            f"{where}: tensor '{shorten(name)}': expected the variable "
            f"'{shorten(str(expected))}' as in the last checkpoint, found '{shorten(str(found))}'",
            "average the training checkpoints rather than exported models, or leave these "
            f"out: {excluding(name)}",
        )


def _exclude_hint(name: str) -> str:
    return (
        "leave that checkpoint out with --glob, --steps or --last, or, if it is not one of the "
        f"weights, copy it from the last one with {excluding(name)}"
    )

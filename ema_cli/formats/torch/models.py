"""Finds the model inside a checkpoint, what its tensors are called, and what else stands there.

Training programs save a dict of many things: the model under a key of their own, optimizers,
other averages, random states, counts of steps. What is known here are the keys that such programs
use; where they leave a choice, the user makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli import hints, naming
from ema_cli.errors import DamagedFile, Disagreement, InputError, UnsupportedInput, UsageError
from ema_cli.formats.torch.nodes import Opaque, TensorRef
from ema_cli.formats.torch.survey import Found, Link, Survey, is_tensor, module_state
from ema_cli.tensors import Caution, Role
from ema_cli.text import command, encodable, plural, shorten, size

# What holds the model, best first.
MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
# The number of updates, best first; an epoch is none.
STEP_KEYS = ("global_step", "num_updates", "step", "steps", "iteration", "iterations", "iter")
# Where a count of updates may stand: itself, or as the last entry of a list.
_STEP_HOLDERS = ("", "trainer_state", "train_state", "trainer", "extra_state", "state")
_HISTORY = "optimizer_history"

_OPTIMIZER = re.compile(
    r"optimizer|scheduler|(?:^|_)(?:optims?|opts?|(?:grad_?)?scaler)(?:_|\d|$)"
    r"|(?-i:^opt(?:im)?[A-Z])",
    re.IGNORECASE,
)
_BESIDE = re.compile(
    r"(?:^|_)(?:ema|swa|shadow|avg|averaged?|averaging|rng|best)(?:_|\d|$)|^current_model_state$"
    r"|^(?:callbacks|loops|hyper_parameters|extra_state|trainer(?:_state)?|args|cfg|config|loss)$",
    re.IGNORECASE,
)
_OPTIMIZER_STATE = {"state", "param_groups"}
_SHOWN = 8
_LARGEST_STEP = 1 << 63


class Named(NamedTuple):
    """A tensor of the checkpoint: its name, what it is, whether of the model or an optimizer."""

    name: str
    node: Any
    of_model: bool
    of_optimizer: bool

    @property
    def role(self) -> Role:
        """What it is for: among the model's, as its name tells."""
        if self.of_model:
            return naming.role_of(self.name, naming.SHADOW_NAME)
        return Role.OPTIMIZER if self.of_optimizer else Role.BESIDE


# ---------------------------------------------------------------------------- finding the model


def find(survey: Survey, key: str) -> tuple[str, ...]:
    """Return the path of the model: the one that `key` names, or the only one there can be.

    Raises `UsageError` when `key` names none, `Disagreement` when there are several, and
    `UnsupportedInput` when there is none.
    """
    root = survey.root
    if is_tensor(root) or not survey.links(root):
        found = "a single tensor" if is_tensor(root) else "no tensors"
        raise UnsupportedInput(
            f"{shorten(survey.path, 1000)}: expected the tensors of a model, found {found}",
            "save the model's state_dict, or leave the file out with --glob",
        )
    if key:
        return _keyed(survey, key)
    if _is_optimizer(root):
        raise _no_model(survey)
    links = survey.links(root)
    holders = {link.name: link for link in links if not is_tensor(link.node)}
    if module_state(root) is not None:
        return ()
    for name in MODEL_KEYS:
        if name in holders and not _is_optimizer(holders[name].node):
            return name, *_inner(survey, holders[name].node)
    direct = [link.name for link in links if is_tensor(link.node)]
    candidates = [link for link in holders.values() if not _is_other(link)]
    if any(not _BESIDE.search(name) for name in direct) or (direct and not candidates):
        return ()
    if len(candidates) != 1:
        raise _ambiguous(survey, candidates) if candidates else _no_model(survey)
    return candidates[0].name, *_inner(survey, candidates[0].node)


def _inner(survey: Survey, node: object) -> tuple[str, ...]:
    """Return where in what holds the model the model itself is: a wrapper holds nothing else."""
    links = [link for link in survey.links(node) if is_tensor(link.node) or not _is_other(link)]
    if module_state(node) is not None or len(links) != 1 or links[0].name not in MODEL_KEYS:
        return ()
    if is_tensor(links[0].node):
        return ()
    return links[0].name, *_inner(survey, links[0].node)


def _is_other(link: Link) -> bool:
    """Whether this is called, or built, like something else than a model."""
    return bool(
        _OPTIMIZER.search(link.name) or _BESIDE.search(link.name) or _is_optimizer(link.node)
    )


def _is_optimizer(node: object) -> bool:
    """Whether this is the state of an optimizer, or an optimizer itself."""
    state = node.state if isinstance(node, Opaque) else node
    if not isinstance(state, dict) or not state.keys() >= _OPTIMIZER_STATE:
        return False
    return isinstance(state["param_groups"], list)


def _keyed(survey: Survey, key: str) -> tuple[str, ...]:
    if key in (".", "/"):
        return ()
    found = _follow(survey, survey.root, key.strip("/"), set())
    if found is None:
        near = hints.did_you_mean(key, [link.name for link in _holders(survey)])
        near = f"{near}; " if near else ""
        raise UsageError(
            f"--key '{shorten(key)}': {shorten(survey.path, 1000)} holds no tensors there",
            f"{near}it holds {_listed(survey, _holders(survey))}",
        )
    return found


def _follow(
    survey: Survey, node: object, key: str, tried: set[tuple[int, str]]
) -> tuple[str, ...] | None:
    """Return the path that `key` means below `node`; longer names win over shorter ones."""
    if not key:
        return ()
    if (id(node), key) in tried:
        return None
    tried.add((id(node), key))
    links = {link.name: link.node for link in survey.links(node) if not is_tensor(link.node)}
    ends = [at for at in range(len(key), 0, -1) if at == len(key) or key[at] in "./"]
    for end in ends:
        if key[:end] in links:
            rest = _follow(survey, links[key[:end]], key[end + 1 :], tried)
            if rest is not None:
                return key[:end], *rest
    return None


# ---------------------------------------------------------------------------- errors


def _holders(survey: Survey) -> list[Link]:
    return [link for link in survey.links(survey.root) if not is_tensor(link.node)]


def _listed(survey: Survey, candidates: Sequence[Link]) -> str:
    """Return candidates with what they hold: ``model (12 tensors, 1.5 MiB)``."""
    shown = []
    for link in candidates[:_SHOWN]:
        nodes = [found.node for found in survey.tensors(link.node)]
        nbytes = sum(node.storage.nbytes for node in nodes if isinstance(node, TensorRef))
        shown.append(f"{shorten(link.name)} ({plural(len(nodes), 'tensor')}, {size(nbytes)})")
    if len(candidates) > _SHOWN:
        shown.append(f"{len(candidates) - _SHOWN} more")
    return ", ".join(shown) or "tensors at its root only, which is --key /"


def _option(key: str) -> str:
    return command("--key", key)


def _ambiguous(survey: Survey, candidates: Sequence[Link]) -> Disagreement:
    return Disagreement(
        f"{shorten(survey.path, 1000)}: expected one model, found {len(candidates)} that may be: "
        f"{_listed(survey, candidates)}",
        f"choose one, such as {_option(candidates[0].name)}, or all of them with --key /",
    )


def _no_model(survey: Survey) -> InputError:
    others = [] if _is_optimizer(survey.root) else _holders(survey)
    return UnsupportedInput(
        f"{shorten(survey.path, 1000)}: expected a model, found only "
        + (_listed(survey, others) if others else "the state of an optimizer"),
        f"average it nevertheless with {_option(others[0].name)}"
        if others
        else "save the model's state_dict, or leave the file out with --glob",
    )


# ---------------------------------------------------------------------------- names and roles


def named(survey: Survey, model: tuple[str, ...]) -> list[Named]:
    """Return all tensors of a checkpoint, in the order of the pickle, by names of their own.

    Those of the model have the names its ``state_dict()`` would give them; all others are called
    by their path from the root.
    """
    found = list(survey.tensors(survey.root))
    apart = _apart(survey) if not model else set()
    mine = [_in_model(one, model, apart) for one in found]
    names: list[str] = [""] * len(found)
    taken: dict[str, int] = {}
    for wanted in (True, False):
        for place, one in enumerate(found):
            if mine[place] is wanted:
                names[place] = _name(one.path, len(model), taken, of_model=wanted)
    optimizers = {link.name for link in survey.links(survey.root) if _is_optimizer(link.node)}
    _check_names(survey.path, names)
    return [
        Named(name, one.node, own, not own and _of_optimizer(one, optimizers))
        for name, one, own in zip(names, found, mine, strict=True)
    ]


def _check_names(path: str, names: Iterable[str]) -> None:
    for name in names:
        if not name.isascii() and not encodable(name):
            raise DamagedFile(path, f"a name holds a lone surrogate: '{shorten(name)}'")


def _apart(survey: Survey) -> set[str]:
    """Return what is not the model's where the model is the root itself."""
    if module_state(survey.root) is not None:
        return set()
    return {link.name for link in _holders(survey) if _is_other(link)}


def _in_model(found: Found, model: tuple[str, ...], apart: set[str]) -> bool:
    inside = found.path[: len(model)] == model and len(found.path) > len(model)
    return inside and found.listed and not (len(found.path) > 1 and found.path[0] in apart)


def _name(path: tuple[str, ...], inner: int, taken: dict[str, int], *, of_model: bool) -> str:
    """Return the name of a tensor; one that is taken is told apart by slashes before its path.

    `taken` holds the names that are, each with the slashes to try next.
    """
    name = ".".join(path[inner:]) if of_model else "/".join(path)
    if name in taken or not name:
        plain = name = "/" + "/".join(path)
        while name in taken:
            name = "/" * taken[plain] + plain
            taken[plain] += 1
    taken[name] = 1
    return name


def _of_optimizer(found: Found, optimizers: set[str]) -> bool:
    below = found.path[:-1]
    return (below[:1] and below[0] in optimizers) or any(map(_OPTIMIZER.search, below))


# ---------------------------------------------------------------------------- what else it tells


def told_step(root: object) -> tuple[int, str] | None:
    """Return the number of updates that stands beside the model, and where, or None."""
    if not isinstance(root, dict):
        return None
    for holder in _STEP_HOLDERS:
        inside = root.get(holder) if holder else root
        if isinstance(inside, dict):
            found = _step_in(inside, f"{holder}/" if holder else "")
            if found is not None:
                return found
    history = root.get(_HISTORY)
    if isinstance(history, list) and history and isinstance(history[-1], dict):
        return _step_in(history[-1], f"{_HISTORY}/-1/")
    return None


def _step_in(entries: Mapping[Any, Any], where: str) -> tuple[int, str] | None:
    for key in STEP_KEYS:
        value = entries.get(key)
        if type(value) is int and 0 <= value < _LARGEST_STEP:
            return value, f"entry {where}{key}"
    return None


def cautions(root: object, model: tuple[str, ...], missing: Sequence[str]) -> list[Caution]:
    """Return what a plan has to warn of; `missing` are tensors of the model that are not read."""
    found = []
    raw = "current_model_state"
    if isinstance(root, dict) and "averaging_state" in root and model == ("state_dict",):
        found.append(
            Caution(
                "already-averaged",
                "state_dict holds weights that training averaged already"
                + (f"; the raw ones are in {raw}" if raw in root else ""),
                f"average those with --key {raw}" if raw in root else "",
            )
        )
    if missing:
        found.append(
            Caution(
                "not-averaged",
                f"{plural(len(missing), 'tensor')} of the model cannot be averaged (quantised, "
                f"sparse, conjugated or of an unknown dtype): {_some(missing)}",
                "a copy of the last checkpoint keeps them as they are; a new file leaves them out",
            )
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    return ", ".join([shorten(name) for name in names[:3]] + more)


def is_plain(node: object) -> bool:
    """Whether the values of a tensor are what is stored."""
    return isinstance(node, TensorRef) and not node.conj and not node.neg

"""How the tensors of an HDF5 file are called, and in which order. Pure strings.

A tensor is called as its dataset, ``layers/dense/vars/0``. But a dataset has no children, so the
shadow of that one lies in a tree of its own, ``/ExponentialMovingAverage/layers/dense/vars/0``,
whose root tells the name of its shadows in an attribute. Where Keras's older layout leaves room,
the shadow of ``dense/kernel:0`` is ``dense/kernel/ExponentialMovingAverage:0``, and the file's root
group lists such names. For us both are ``<variable>/ExponentialMovingAverage``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ema_cli.naming import SHADOW_NAME, unique_name

# The formats: a file, and Keras's archive with one inside.
NAME = "hdf5"
KERAS = "keras"

# The attribute of a group of shadows, or of the root, that holds what their names end in.
SHADOWS_ATTRIBUTE = "ema_avg_shadows"
NAME_LIMIT = 4096
# Of the links that a path consists of: in bytes, and how many; shadows lie a little deeper.
LINK_LIMIT, DEPTH_LIMIT = 1024, 60

# Stands for two bytes that only Keras's configuration can tell to be a bfloat16.
UNMARKED = "opaque16"

_OUTPUT = re.compile(r":\d+$")
_DIGITS = re.compile(r"(\d+)")
# What TensorFlow's shadows end in.
_USUAL = (f"{SHADOW_NAME}/biased", f"{SHADOW_NAME}/local_step", SHADOW_NAME)


def keras_layout(tensors: Collection[str], keras_version: bool) -> str:
    """Return ``keras 3``, ``whole model``, ``older weights``, or empty for none of Keras's layouts.

    Args:
        tensors: the names in a file.
        keras_version: whether it has the attribute of that name, as older layouts have.
    """
    firsts = {name.split("/", 1)[0] for name in tensors}
    if "layers" in firsts and not keras_version:
        return "keras 3"
    if keras_version:
        return "whole model" if "model_weights" in firsts else "older weights"
    return ""


class Shadows(NamedTuple):
    """Where shadows lie.

    Attributes:
        trees: (end of a name, root group) pairs.
        ends: ends of names that stand within dataset names.
    """

    trees: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()


def tensor_name(path: str, shadows: Shadows) -> str:
    """Return what the tensor in the dataset `path` (without a leading "/") is called."""
    variable, end = parted(path, shadows)
    return f"{variable}/{end}" if end else path


def parted(path: str, shadows: Shadows) -> tuple[str, str]:
    """Return the dataset of the variable whose shadow lies in `path`, and the shadow's end.

    What is no shadow is a variable here: (`path`, "").
    """
    for end, tree in shadows.trees:
        if path.startswith(f"{tree}/"):
            return path[len(tree) + 1 :], end
    output = _OUTPUT.search(path)
    if output is not None:
        for end in shadows.ends:
            variable = path[: output.start()].removesuffix(f"/{end}")
            if variable and variable != path[: output.start()]:
                return f"{variable}{output[0]}", end
    return path, ""


def plain_group(group: str, shadows: Shadows) -> str:
    """Return the group of the variables whose shadows lie in `group`; itself outside of trees."""
    root, _, inner = group.partition("/")
    return inner if any(root == tree for _, tree in shadows.trees) else group


def dataset_path(name: str, shadows: Shadows) -> str:
    """Return the dataset in which the tensor `name` lies: the inverse of `tensor_name`."""
    for end, tree in (*((end, "") for end in shadows.ends), *shadows.trees):
        variable = name.removesuffix(f"/{end}")
        if variable and variable != name:
            output = _OUTPUT.search(variable)
            if tree:
                return f"{tree}/{variable}"
            if output is not None and output.start():
                return f"{variable[: output.start()]}/{end}{output[0]}"
    return name


def shadows_of(entries: Iterable[tuple[str, str]], known: Shadows) -> Shadows:
    """Return where the shadows among (name, name of what it is made of) pairs shall lie.

    `known` are those of the checkpoint that the entries come from.
    """
    pairs = list(entries)
    usual = (*(end for end, _ in known.trees), *known.ends, *_USUAL)
    found: dict[str, None] = {}
    outputs = False
    for name, source in pairs:
        end = _shadow_end(name, source, usual)
        if end:
            found[end] = None
            outputs = outputs or _OUTPUT.search(name.removesuffix(f"/{end}")) is not None
    ends = sorted(found, key=len, reverse=True)  # "name/biased" before "name"
    taken = {name.split("/", 1)[0].lower() for name, _ in pairs}
    trees = []
    for end in ends:
        plain = end.replace("/", ".")
        tree = unique_name(plain if plain.strip(".") else "shadows", taken)
        taken.add(tree.lower())
        trees.append((end, tree))
    return Shadows(tuple(trees), tuple(ends) if outputs else ())


def _shadow_end(name: str, source: str, usual: Iterable[str]) -> str:
    """Return what follows the variable in the name of a shadow, or "" for other tensors."""
    if name.startswith(f"{source}/"):
        return name[len(source) + 1 :]
    return next((end for end in usual if name.endswith(f"/{end}")), "")


def can_name(name: str) -> bool:
    """Whether a dataset can have this name, each part of which becomes a link."""
    if not is_path(name):
        return False
    links = name.encode("utf-8", "surrogateescape").split(b"/")
    return (
        len(name) <= NAME_LIMIT and len(links) <= DEPTH_LIMIT and max(map(len, links)) <= LINK_LIMIT
    )


def is_path(name: str) -> bool:
    """Whether a name consists of what links can be called."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def natural(path: str) -> tuple[object, ...]:
    """Sort key that puts ``vars/10`` after ``vars/2``, as Keras counts."""
    parts = _DIGITS.split(path)
    for k in range(1, len(parts), 2):
        digits = parts[k].lstrip("0")
        parts[k] = f"{len(digits):05d}{digits}"
    return tuple(parts)


def ancestors(path: str) -> Iterable[str]:
    """Yield the groups a dataset or group lies in, the root ("") last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def blocked(paths: Sequence[str]) -> tuple[str, str] | None:
    """Return (dataset, what would have to lie inside it), or None when no name needs that."""
    datasets = set(paths)
    for path in paths:
        for group in ancestors(path):
            if group in datasets:
                return group, path
    return None


def under(path: str, groups: Collection[str]) -> bool:
    """Whether `path` lies below one of `groups`."""
    return any(group in groups for group in ancestors(path))

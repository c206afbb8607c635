"""What the tensors of a Keras file are for.

Keras 3 keeps the variables of a layer in a group ``vars``, numbered in the order in which the layer
made them, and names the group after the layer's class: so of a batch normalisation the last two are
its moving statistics. Its older layout names every variable. A configuration, where a file has one,
tells the class of every layer and which are frozen. Source: keras/src/saving/saving_lib.py and
keras/src/legacy/saving/legacy_h5_format.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ema_cli.formats.hdf5.config import Config, Layer, snake_case
from ema_cli.formats.hdf5.names import natural
from ema_cli.formats.hdf5.structure import Dataset, Structure
from ema_cli.naming import SHADOW_NAME, role_of
from ema_cli.tensors import DTYPES, Caution, Role
from ema_cli.text import plural, shorten

_VARS = "vars"
_WEIGHTS, _OPTIMIZER = "model_weights", "optimizer_weights"
_OUTPUT = re.compile(r":\d+$")
_NUMBER = re.compile(r"_\d+$")
_IS_OPTIMIZER = re.compile(r"(?:^|_)optimizer$")
_IS_METRIC = re.compile(r"(?:^|_)(?:metrics?|tracker)$")
# What Keras calls optimizers that get no name.
_OPTIMIZERS = {
    "sgd",
    "rmsprop",
    "adam",
    "adamw",
    "adadelta",
    "adagrad",
    "adamax",
    "adafactor",
    "nadam",
    "ftrl",
    "lion",
    "lamb",
    "muon",
    "loss_scale_optimizer",
}
# Layers whose own variables are states of sequences, not weights: those are in their cells.
_STATEFUL = {"lstm", "gru", "rnn", "simple_rnn", "conv_lstm1d", "conv_lstm2d", "conv_lstm3d"}
_LEGACY_STATISTICS = {
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
    "renorm_mean_weight",
    "renorm_stddev_weight",
}
_LEGACY_FIXED = {"vector_u", "sn_u"}
# A file that says nothing of its layers' classes: names under which people keep such a layer.
_LIKE_NORMALISATION = re.compile(r"(?:^|_)(?:bn|batch_?norm\w*)\d*(?:_|$)", re.IGNORECASE)

# How many variables a batch normalisation has, of which how many are statistics: gamma and beta are
# optional, renormalisation adds three.
_STATISTICS_OF = {2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5}


class Told(NamedTuple):
    """What the datasets of a file are for, by path.

    Attributes:
        roles: of every dataset, or of none when it is no Keras file.
        source: what told them, for people.
        full_names: how the training program calls them, where the file tells.
        cautions: what was assumed.
        step: the dataset that counts the optimizer's steps, or empty.
    """

    roles: Mapping[str, Role]
    source: str = ""
    full_names: Mapping[str, str] = {}
    cautions: tuple[Caution, ...] = ()
    step: str = ""


def told(structure: Structure, config: Config, config_name: str) -> Told:
    """Return what the datasets are for; `config_name` is where the configuration stands."""
    if any("layer_names" in structure.groups.get(g, {}) for g in ("", _WEIGHTS)):
        return _legacy(structure, config, config_name)
    if any(_in_vars(dataset.path) for dataset in structure.datasets):
        return _Groups(structure, config).told(config_name)
    return Told({})


def _in_vars(path: str) -> bool:
    return path.split("/")[-2:-1] == [_VARS]


def _is_float(dataset: Dataset) -> bool:
    return dataset.dtype not in DTYPES or DTYPES[dataset.dtype].floating


def _counts(dataset: Dataset | None) -> bool:
    return dataset is not None and dataset.dtype in ("int64", "int32") and dataset.shape == ()


# ---------------------------------------------------------------------------- Keras 3


class _Groups:
    """The groups of a file in Keras 3's layout, and what they are taken for."""

    def __init__(self, structure: Structure, config: Config) -> None:
        self._structure = structure
        self._config = config
        self._roles: dict[str, Role] = {}
        self._assumed: list[str] = []
        self._quantised: list[str] = []
        self._by_path = {dataset.path: dataset for dataset in structure.datasets}

    def told(self, config_name: str) -> Told:
        groups: dict[str, list[Dataset]] = {}
        for dataset in sorted(self._structure.datasets, key=lambda d: natural(d.path)):
            path = dataset.path
            if _in_vars(path):
                groups.setdefault(path.rpartition("/")[0], []).append(dataset)
            else:
                self._roles[path] = role_of(path, SHADOW_NAME)
        for group, datasets in groups.items():
            roles = self._group(group.removesuffix(_VARS).removesuffix("/"), datasets)
            for dataset, role in zip(datasets, roles, strict=True):
                self._roles[dataset.path] = role
        step = f"optimizer/{_VARS}/0"
        known = bool(self._config.by_path or self._config.by_name)
        return Told(
            self._roles,
            f"{config_name} and the groups of its layers" if known else "the groups of its layers",
            {},
            self._cautions(),
            step if _counts(self._by_path.get(step)) else "",
        )

    def _group(self, path: str, datasets: Sequence[Dataset]) -> list[Role]:
        """Return the roles of the variables of one layer, optimizer or metric."""
        parts = path.split("/")
        name = self._name(path)
        if self._is_optimizer(parts, name, datasets):
            return [Role.OPTIMIZER] * len(datasets)
        if any(map(_IS_METRIC.search, parts)):
            return [Role.FIXED] * len(datasets)
        layer = self._layer(path, name)
        if any(dataset.dtype in ("int8", "uint8") for dataset in datasets):
            self._quantised += [d.path for d in datasets if _is_float(d)]
            return [Role.FIXED] * len(datasets)
        roles = self._layer_roles(parts[-1], name, layer, datasets)
        if layer is not None and not layer.trainable:
            return [Role.FIXED] * len(datasets)
        return [
            role if _is_float(dataset) else Role.FIXED
            for role, dataset in zip(roles, datasets, strict=True)
        ]

    def _name(self, path: str) -> str:
        """Return the name of the layer, which newer versions keep in an attribute."""
        group = f"{path}/{_VARS}" if path else _VARS
        names = self._structure.groups.get(group, {}).get("name", ())
        return names[0] if len(names) == 1 else ""

    def _is_optimizer(self, parts: Sequence[str], name: str, datasets: Sequence[Dataset]) -> bool:
        if any(map(_IS_OPTIMIZER.search, parts)):
            return True
        return _counts(datasets[0]) and _NUMBER.sub("", name) in _OPTIMIZERS

    def _layer(self, path: str, name: str) -> Layer | None:
        config = self._config
        last = path.rpartition("/")[2]
        return config.by_name.get(name) or config.by_path.get(path) or config.by_name.get(last)

    def _layer_roles(
        self, last: str, name: str, layer: Layer | None, datasets: Sequence[Dataset]
    ) -> list[Role]:
        """Return the roles by the layer's class, told or as its group or itself is called."""
        kinds = {snake_case(layer.kind)} if layer else {_NUMBER.sub("", t) for t in (last, name)}
        count = len(datasets)
        statistics = _STATISTICS_OF.get(count, 0) if _alike(datasets) else 0
        if any("batch_norm" in kind or "batchnorm" in kind for kind in kinds):
            return _roles(count, statistics, Role.STATISTICS)
        if kinds & _STATEFUL:
            return _roles(count, count, Role.FIXED)
        if "normalization" in kinds:  # of inputs, adapted once
            return _roles(count, count, Role.FIXED)
        if "spectral_normalization" in kinds:
            return _roles(count, 1, Role.FIXED)
        looks = count == 4 or any(map(_LIKE_NORMALISATION.search, (last, name)))
        if layer is None and statistics and looks:
            self._assumed += [dataset.path for dataset in datasets[-statistics:]]
            return _roles(count, statistics, Role.STATISTICS)
        return _roles(count, 0, Role.VARIABLE)

    def _cautions(self) -> tuple[Caution, ...]:
        found = []
        if self._assumed:
            found.append(
                Caution(
                    "assumed-statistics",
                    f"{plural(len(self._assumed), 'tensor')} taken for moving statistics of batch "
                    f"normalisation by number and shape alone, as nothing in the file tells: "
                    f"{_some(self._assumed)}",
                    "a .keras file tells the classes of its layers",
                )
            )
        if self._quantised:
            found.append(
                Caution(
                    "quantised",
                    f"{plural(len(self._quantised), 'tensor')} beside 8 bit weights not averaged: "
                    f"{_some(self._quantised)}",
                    "average the checkpoints from before the model was quantised",
                )
            )
        return tuple(found)


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(shorten(path) for path in paths[:3])
    return f"{shown}, …" if len(paths) > 3 else shown


def _roles(count: int, last: int, role: Role) -> list[Role]:
    """Return roles of which the `last` ones are this one and the others variables."""
    return [Role.VARIABLE] * (count - last) + [role] * last


def _alike(datasets: Sequence[Dataset]) -> bool:
    """Whether these are vectors of one length."""
    shapes = {dataset.shape for dataset in datasets}
    return len(shapes) == 1 and len(shapes.pop()) == 1 and all(map(_is_float, datasets))


# ---------------------------------------------------------------------------- the older layout


def _legacy(structure: Structure, config: Config, config_name: str) -> Told:
    whole = _WEIGHTS in structure.groups
    roles: dict[str, Role] = {}
    full_names: dict[str, str] = {}
    for dataset in structure.datasets:
        parts = _OUTPUT.sub("", dataset.path).split("/")
        if whole and parts[0] == _OPTIMIZER:
            roles[dataset.path] = Role.OPTIMIZER
            continue
        if whole and parts[0] == _WEIGHTS:
            parts = parts[1:]
        roles[dataset.path] = _legacy_role(dataset, parts, config)
        full_names[dataset.path] = "/".join(parts[1:])
    named = "the names of its weights"
    source = f"{config_name} and {named}" if config.by_name else named
    return Told(roles, source, full_names, (), _legacy_step(structure))


def _legacy_role(dataset: Dataset, parts: Sequence[str], config: Config) -> Role:
    """Return the role of ``<layer>/<path of the variable>``."""
    known = [config.by_name[part] for part in parts[:-1] if part in config.by_name]
    if not _is_float(dataset) or any(not layer.trainable for layer in known):
        return Role.FIXED
    if parts[-1] in _LEGACY_STATISTICS:
        return Role.STATISTICS
    adapted = bool(known) and known[-1].kind == "Normalization"
    if parts[-1] in _LEGACY_FIXED or adapted:
        return Role.FIXED
    role = role_of("/".join(parts), SHADOW_NAME)
    return Role.VARIABLE if role is Role.OPTIMIZER else role


def _legacy_step(structure: Structure) -> str:
    """Return the dataset that counts steps: the first of an optimizer's weights."""
    weights = structure.groups.get(_OPTIMIZER, {}).get("weight_names", ())
    path = f"{_OPTIMIZER}/{weights[0]}" if weights else ""
    dataset = next((d for d in structure.datasets if d.path == path), None)
    name = _OUTPUT.sub("", path).rpartition("/")[2]
    return path if _counts(dataset) and name in ("iteration", "iterations", "iter") else ""

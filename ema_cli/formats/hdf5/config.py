"""What a model's configuration tells of its layers: their classes and what is frozen.

The configuration is JSON that describes how to build a model. Nothing here builds anything or looks
up a class: names are compared, and that is all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ema_cli.errors import DamagedFile

CONFIG_LIMIT = 16 << 20
# Each of these may become an object of some 100 bytes.
_MARKS_LIMIT = 1_500_000

_FIRST_CAP = re.compile(r"(.)([A-Z][a-z]+)")
_OTHER_CAP = re.compile(r"([a-z])([A-Z])")
# Attributes in which layers keep others under another name than in their configuration.
_ATTRIBUTES = {"Bidirectional": {"layer": "forward_layer"}}


class Layer(NamedTuple):
    """A layer: the name of its class, and whether it is trained."""

    kind: str
    trainable: bool


class Config(NamedTuple):
    """What is known of a model.

    Attributes:
        by_name: layers whose name only one layer has, or several of one kind.
        by_path: layers by where Keras 3 saves them.
        bfloat16: whether layers have variables of this dtype.
    """

    by_name: Mapping[str, Layer]
    by_path: Mapping[str, Layer]
    bfloat16: bool


NO_CONFIG = Config({}, {}, False)


def parse(path: str, text: bytes | str, what: str) -> Config:
    """Return what a configuration tells; `what` it is called in errors. Raises `DamagedFile`."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            raise DamagedFile(path, f"{what} is not UTF-8") from None
    marks = sum(text.count(mark) for mark in "[{,")
    if len(text) > CONFIG_LIMIT or marks > _MARKS_LIMIT:
        raise DamagedFile(path, f"{what} is too large: {len(text):,} characters")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedFile(path, f"{what} is not JSON") from None
    if not isinstance(document, dict):
        raise DamagedFile(path, f"{what}: expected an object")
    nodes = list(_nodes(document))
    return Config(_by_name(nodes), _by_path(document), any(map(_is_bfloat16, nodes)))


def snake_case(name: str) -> str:
    """Return how Keras calls what belongs to a class of this name."""
    name = re.sub(r"\W+", "", name)
    return _OTHER_CAP.sub(r"\1_\2", _FIRST_CAP.sub(r"\1_\2", name)).lower()


def _is_node(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    kind, config = value.get("class_name"), value.get("config")
    return isinstance(kind, str) and isinstance(config, dict)


def _nodes(document: Any) -> Iterator[dict[str, Any]]:
    """Yield every serialised object, however deep."""
    pending = [document]
    while pending:
        value = pending.pop()
        if _is_node(value):
            yield value
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _layer(node: Mapping[str, Any]) -> Layer:
    return Layer(node["class_name"], node["config"].get("trainable") is not False)


def _by_name(nodes: list[dict[str, Any]]) -> Mapping[str, Layer]:
    found: dict[str, Layer] = {}
    clashing: set[str] = set()
    for node in nodes:
        name = node["config"].get("name")
        if isinstance(name, str) and "trainable" in node["config"]:
            layer = _layer(node)
            if found.setdefault(name, layer) != layer:
                clashing.add(name)
    return {name: layer for name, layer in found.items() if name not in clashing}


def _is_bfloat16(node: Mapping[str, Any]) -> bool:
    policy = node["config"].get("dtype")
    if isinstance(policy, dict) and isinstance(policy.get("config"), dict):
        policy = policy["config"].get("name")
    return bool(policy == "bfloat16")


def _by_path(document: Mapping[str, Any]) -> Mapping[str, Layer]:
    """Return layers by the group in which Keras 3 keeps their variables."""
    found: dict[str, Layer] = {}
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        path, node = pending.pop()
        if _is_node(node):
            if path:
                found[path] = _layer(node)
            inner = f"{path}/" if path else ""
            pending.extend((inner + name, child) for name, child in _children(node))
    return found


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (where it is kept, node) of the layers directly in one."""
    kind, config = node["class_name"], node["config"]
    names = _ATTRIBUTES.get(kind, {})
    for key, value in config.items():
        if _is_node(value):
            yield names.get(key, key), value
        elif isinstance(value, list):
            used: dict[str, int] = {}
            for k, child in enumerate(value):
                if not _is_node(child) or (kind == "Sequential" and not k and _is_input(child)):
                    continue
                name = snake_case(child["class_name"])
                used[name] = used.get(name, -1) + 1
                yield f"{key}/{name}_{used[name]}" if used[name] else f"{key}/{name}", child


def _is_input(node: Mapping[str, Any]) -> bool:
    return bool(node["class_name"] == "InputLayer")

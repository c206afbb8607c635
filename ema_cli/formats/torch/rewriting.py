"""Writes a checkpoint anew without the objects in it: its tensors and its plain data stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ema_cli.blueprint import COPY, Draft
from ema_cli.errors import EmaError, UnsupportedInput
from ema_cli.formats.torch import models, storing
from ema_cli.formats.torch.encoding import plain
from ema_cli.formats.torch.indexing import Contents, Own, tensors_of
from ema_cli.formats.torch.nodes import Opaque, Ordered, TensorRef
from ema_cli.formats.torch.survey import Survey, everything
from ema_cli.tensors import Checkpoint, Tensor
from ema_cli.text import shorten

_SHOWN = 5


def rewritten(last: Checkpoint, contents: Contents, averaged: Sequence[Tensor]) -> Draft:
    """Return a new file with the tensors and plain data of `last`.

    Tensors inside of objects are gone with them, but for those of the model, which has its
    ``state_dict()`` instead. All others have their names and share storages as before.
    """
    model = last.index.own.model if isinstance(last.index.own, Own) else ()
    before = Survey(last.path, contents.root)
    root, dropped = plain(_opened(before, model))
    after = Survey(last.path, root)
    named = models.named(after, model)
    names = {id(one.node): one.name for one in reversed(named)}  # the first of each
    sources = {tensor.name: tensor for tensor in tensors_of(last.path, contents, named)}
    refs = [node for node in everything(root) if isinstance(node, TensorRef)]
    _check(last, sources, [names.get(id(ref)) for ref in refs], averaged)
    if _found(before) == model != _found(after):
        raise _refusal(last.path)
    chosen = [sources[names[id(ref)]] for ref in refs]
    items = [storing.item_of(*source[:3], source, COPY) for source in chosen]
    for ref, new in zip(refs, storing.refs_of(items).values(), strict=True):
        ref.storage, ref.offset, ref.strides = new.storage, new.offset, new.strides
    made = storing.lay_out("", root, items, big_endian=contents.big_endian)
    # A tensor that stands in several places has as many names.
    places = {t.name: made.places[names[id(t.node)]]._replace(name=t.name) for t in named}
    notes = _notes(dropped, replaced=isinstance(before.at(model), Opaque))
    return Draft([made.file], places, tuple(made.crc_at), made.crc_at, notes)


def _check(
    last: Checkpoint,
    sources: Mapping[str, Tensor],
    names: Sequence[str | None],
    averaged: Sequence[Tensor],
) -> None:
    """Check that what is averaged is there, and that every tensor has a name, its old one."""
    old = last.index.by_name
    known = all(name in sources for name in names)
    same = all(old.get(name) == tensor for name, tensor in sources.items())
    if not known or not same or not all(tensor.name in sources for tensor in averaged):
        raise _refusal(last.path)


def _found(survey: Survey) -> tuple[str, ...] | None:
    """Return where the model is found without a key."""
    try:
        return models.find(survey, "")
    except EmaError:
        return None


def _refusal(path: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{shorten(path, 1000)}: it holds tensors that are negated, conjugated or hidden among "
        "objects, and cannot be written without these",
        "pass it on as it is with --unknown keep",
    )


def _notes(dropped: Sequence[str], *, replaced: bool) -> tuple[str, ...]:
    notes = []
    if replaced:
        notes.append("holds the state_dict of the model, where its input holds an object")
    if dropped:
        some = ", ".join(shorten(one) for one in dropped[:_SHOWN])
        more = f" and {len(dropped) - _SHOWN} more" if len(dropped) > _SHOWN else ""
        notes.append(f"left out, since it is no plain data: {some}{more}")
    return tuple(notes)


def _opened(survey: Survey, model: tuple[str, ...]) -> object:
    """Return the root with what an object holds of the model in dicts instead."""
    inside = survey.at(model)
    found = list(survey.tensors(inside))
    if any(isinstance(node, Opaque) for node in survey.passed(inside)):
        inside = Ordered((".".join(one.path), one.node) for one in found if one.listed)
    return _replaced(survey, survey.root, model, inside)


def _replaced(survey: Survey, node: Any, path: tuple[str, ...], new: object) -> object:
    """Return a copy of `node` with `new` at a path."""
    if not path:
        return new
    links = {link.name: link.node for link in survey.links(node)}
    old, made = links[path[0]], _replaced(survey, links[path[0]], path[1:], new)
    if made is old:
        return node
    if isinstance(node, Opaque):
        return {**links, path[0]: made}
    if isinstance(node, dict):
        copy = Ordered(node, node.attributes) if isinstance(node, Ordered) else dict(node)
        copy.update({key: made for key, value in node.items() if value is old})
        return copy
    return [made if one is old else one for one in node]

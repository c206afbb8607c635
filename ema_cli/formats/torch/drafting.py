"""Drafts PyTorch files: copies of a checkpoint with other storages, and new state_dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ema_cli.blueprint import Draft, Entry, File, Layout, Patch
from ema_cli.errors import UnsupportedInput
from ema_cli.formats.torch import rewriting, storing
from ema_cli.formats.torch.encoding import plain
from ema_cli.formats.torch.indexing import NAME, Contents, Own
from ema_cli.formats.torch.nodes import Global, Ordered, TensorRef
from ema_cli.formats.torch.policy import judge
from ema_cli.formats.torch.reading import contents_of, uncollected
from ema_cli.formats.torch.survey import Survey, everything, where
from ema_cli.tensors import Checkpoint, DType, Extent, Tensor
from ema_cli.text import encodable, shorten

KEEP, DROP = "keep", "drop"

_SHOWN = 5


def representable(dtype: DType) -> bool:
    """Whether PyTorch has this dtype."""
    return dtype.name in storing.WRITABLE


def can_name(name: str) -> bool:
    """Whether a tensor of a state_dict can have this name."""
    return bool(name) and encodable(name)


def seal(layout: Layout, crc_of: Mapping[Extent, int]) -> list[Patch]:
    """Return the CRC-32 of each storage that is not copied, wherever the archive states it."""
    places: Mapping[Extent, tuple[int, ...]] = layout.own if isinstance(layout.own, dict) else {}
    return [
        Patch(extent.file, at, crc_of[extent].to_bytes(4, "little"))
        for extent, positions in places.items()
        for at in positions
    ]


# ---------------------------------------------------------------------------- copies


@uncollected()
def template(last: Checkpoint, averaged: Sequence[Tensor], unknown: str) -> Draft | None:
    """Return the file of `last` with other storages, or None for one in the stream format.

    Args:
        last: the checkpoint.
        averaged: its tensors whose bytes will differ.
        unknown: what becomes of objects of which nothing is known but their class: "refuse",
            "keep" them as they are, or "drop" all that is not plain data.

    Raises `UnsupportedInput` for such objects when they are to be refused.
    """
    contents = contents_of(last.files[0])
    if not contents.cloned:
        return None
    own = last.index.own
    verdict = own.verdict if isinstance(own, Own) else judge(contents.globals)
    if verdict.unknown and unknown == DROP:
        return rewriting.rewritten(last, contents, averaged)
    if verdict.unknown and unknown != KEEP:
        raise _refusal(last.path, contents.root, verdict.unknown)
    others = (*verdict.unknown, *verdict.inert)
    note = f"loads with weights_only=False only, as its input does: it holds {_listed(others)}"
    places = _records(contents, averaged) if contents.checked else {}
    file = last.files[0]
    return Draft(
        [File("", file.size, copy_of=file.path)],
        last.index.by_name,
        tuple(places),
        places,
        (note,) if others else (),
    )


def _records(contents: Contents, averaged: Sequence[Tensor]) -> dict[Extent, tuple[int, ...]]:
    """Return the storages that hold averaged tensors, with the offsets of their CRCs."""
    stored = sorted(one for one in contents.storages.values() if one.nbytes)
    found: dict[Extent, tuple[int, ...]] = {}
    place = 0
    for _, offset, nbytes in sorted(tensor.extent for tensor in averaged):
        while nbytes and offset >= stored[place].offset + stored[place].nbytes:
            place += 1
        if nbytes:
            found[Extent(0, stored[place].offset, stored[place].nbytes)] = stored[place].crc_at
    return found


def _listed(names: Sequence[Global]) -> str:
    shown = ", ".join(shorten(name.full, 100) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _refusal(path: str, root: object, unknown: Sequence[Global]) -> UnsupportedInput:
    places = where(root, set(unknown))
    shown = [
        shorten(name.full, 100) + (f" (at {places[name]})" if places.get(name) else "")
        for name in unknown[:_SHOWN]
    ]
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return UnsupportedInput(
        f"{shorten(path, 1000)}: its pickle calls names that are neither PyTorch's nor known plain "
        f"data: {', '.join(shown)}{more}",
        "drop them with --unknown drop (the tensors and plain data stay), or pass them on as they "
        "are with --unknown keep",
    )


# ---------------------------------------------------------------------------- new files


@uncollected()
def fresh(entries: Sequence[Entry], last: Checkpoint) -> Draft:
    """Return a state_dict of the entries, which share storages where their sources do.

    It has the ``_metadata`` of the model in `last` when that is of PyTorch and no name changed.
    """
    by_name = last.index.by_name
    items = [storing.item_of(*entry[:3], by_name[entry.source], entry.part) for entry in entries]
    root = Ordered(storing.refs_of(items).items())
    metadata = _metadata(last, entries)
    if metadata is not None:
        root.attributes["_metadata"] = metadata
    big_endian = last.index.format == NAME and last.index.big_endian
    made = storing.lay_out("", root, items, big_endian=big_endian)
    sums = tuple(made.crc_at)
    return Draft([made.file], made.places, sums, made.crc_at, big_endian=big_endian)


def _metadata(last: Checkpoint, entries: Sequence[Entry]) -> object:
    """Return what the model in `last` records of its modules: their versions; or None."""
    own = last.index.own
    if not isinstance(own, Own) or any(entry.name != entry.source for entry in entries):
        return None
    contents = contents_of(last.files[0])
    model = Survey(last.path, contents.root).at(own.model)
    found = model.attributes.get("_metadata") if isinstance(model, Ordered) else None
    kept, dropped = plain(found)
    if dropped or any(isinstance(node, TensorRef) for node in everything(kept)):
        return None
    return kept

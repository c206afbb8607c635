"""Which tensors the slot of a state holds: shadows, and what is copied of the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ema_cli import kernel
from ema_cli.blueprint import Entry, File, Layout
from ema_cli.formats import safetensors
from ema_cli.layout import EXPANSION_LIMIT
from ema_cli.naming import shadow_of
from ema_cli.plan import Request
from ema_cli.selection import Selection
from ema_cli.states import slots
from ema_cli.states.records import AVERAGE, BIASED, COPY, Held
from ema_cli.states.slots import Slot
from ema_cli.tensors import DTYPES, Checkpoint, DType, Extent, Tensor


class Holding(NamedTuple):
    """What of a checkpoint goes into a slot, and what is left out of its structure for that.

    Attributes:
        slot: the slot.
        removed: tensors whose bytes the structure of the checkpoint does not need.
    """

    slot: Slot
    removed: frozenset[str]


def hold(
    request: Request,
    selection: Selection,
    shared: Sequence[Mapping[str, object]],
    *,
    complete: bool,
) -> Holding:
    """Return what a slot holds of the last checkpoint that `selection` is about.

    Args:
        request: with the averages.
        selection: of the last checkpoint.
        shared: of each new checkpoint, and of the slot before, where each tensor lies. What is one
            in all of them is averaged once.
        complete: whether optimizer state and what stands beside the model are held.
    """
    copies = [choice.tensor for choice in selection.copied]
    beside = [*selection.optimizer, *selection.beside]
    held = [*_shadows(request, selection, shared), *_copies(copies + (beside if complete else []))]
    kept = {name for one in held for name in one.variables}
    gone = {tensor.name for tensor in (*selection.replaced, *([] if complete else beside))}
    return Holding(slots.lay_out(held), frozenset(kept | gone))


def _shadows(
    request: Request, selection: Selection, shared: Sequence[Mapping[str, object]]
) -> Iterator[Held]:
    single = len(request.averages) == 1
    for average, asked in enumerate(request.averages):
        prefix = "" if single else f"{asked.label}/"
        for part in (AVERAGE, BIASED) if asked.zero_debias else (AVERAGE,):
            for names, tensor in _tied(selection.averaged, shared):
                name = prefix + tensor.name
                if part == BIASED:
                    name = f"{shadow_of(name, request.wishes.name)}/biased"
                dtype = shadow_dtype(tensor.dtype, request.shadow_dtype)
                yield Held(name, dtype, tensor.shape, part, average, tuple(names))


def shadow_dtype(dtype: DType, choice: str) -> DType:
    """Return the dtype of the shadow of a variable."""
    return DTYPES[kernel.shadow_dtype(dtype.name, choice)]


def _tied(
    tensors: Iterable[Tensor], shared: Sequence[Mapping[str, object]] = ()
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each tensor with all names under which it is stored, here and wherever is `shared`."""
    found: dict[object, tuple[list[str], Tensor]] = {}
    for tensor in tensors:
        alone = not tensor.nbytes or tensor.slices
        others = tuple(places.get(tensor.name) for places in shared)
        key = tensor.name if alone else (tensor.dtype.name, tensor[2:], others)
        found.setdefault(key, ([], tensor))[0].append(tensor.name)
    yield from found.values()


def _copies(tensors: Iterable[Tensor]) -> Iterator[Held]:
    """Yield what can be held of the tensors to copy; the rest stays in the structure."""
    possible = (
        tensor
        for tensor in tensors
        if slots.can_hold(tensor.dtype)
        and safetensors.can_name(tensor.name)
        and tensor.nbytes - tensor.extent.nbytes <= EXPANSION_LIMIT
    )
    for names, tensor in _tied(possible):
        yield Held(tensor.name, tensor.dtype, tensor.shape, COPY, 0, tuple(names))


def layouts(slot: Slot, last: Checkpoint, averages: int, path: str) -> list[Layout]:
    """Return the slot as the output of each average; the first one has the copies too."""
    file = File("", slot.nbytes, ((0, slot.head),))
    made = []
    for average in range(averages):
        entries: list[Entry] = []
        places: dict[str, Tensor] = {}
        for held, extent in zip(slot.held, slot.extents, strict=True):
            if held.average == average:
                new = list(_entries(held))
                entries.extend(new)
                places.update((entry.name, _place(entry, extent)) for entry in new)
        made.append(
            Layout(
                path,
                safetensors.NAME,
                "file",
                "variable",
                tuple(entries),
                (file,),
                places,
                (),
                last,
            )
        )
    return made


def _entries(held: Held) -> Iterator[Entry]:
    # Written once: what is written twice counts for nothing in a checksum.
    variables = held.variables[:1] if held.part == COPY else held.variables
    for k, variable in enumerate(variables):
        name = held.name if k == 0 else f"{held.name} as {variable}"
        yield Entry(name, held.dtype, held.shape, held.part, variable)


def _place(entry: Entry, extent: Extent) -> Tensor:
    return Tensor(entry.name, entry.dtype, entry.shape, extent)

"""Attacks 72, 75, 76, 80 and 86 on torch files: records, storages, views, other kinds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attacks import READ, REFUSED, Attack, Ends, Values, writing
from pickle_attacks import PT, SOUND, B, W, of_value, of_weight
from raw_pickle import (
    FALSE,
    HOOKS,
    NONE,
    PERSID,
    RECORDS,
    TRUE,
    W_BYTES,
    checkpoint,
    glob,
    ints,
    items,
    listed,
    mapping,
    number,
    real,
    reduce,
    storage,
    tensor,
    text,
    torch_file,
)
from raw_zip import MIB

FLOATS = glob("torch", "FloatStorage")


def of_bytes(
    name: str,
    item: int,
    what: str,
    content: bytes,
    *words: str,
    ends: Ends = REFUSED,
    values: Values | None = None,
    suffix: str = PT,
) -> Attack:
    """Return an attack that is these bytes."""
    return Attack(name, (item,), what, writing(suffix, content), ends, words, values)


def of_records(name: str, item: int, what: str, **records: bytes) -> Attack:
    """Return an attack whose records are not what its pickle says."""
    kept = {key: data for key, data in {**RECORDS, **records}.items() if data != b"gone"}
    return of_bytes(name, item, what, torch_file(checkpoint(), kept))


# ---------------------------------------------------------------------------- 72, 80: storages

_NUMELS: Mapping[str, bytes | int] = {
    "too small": 5,
    "too large": 7,
    "none": 0,
    "negative": -6,
    "of 2^62": 1 << 62,
    "of 2^2030": 1 << 2030,
    "that wraps around": (1 << 62) + 6,
    "that is a float": real(6),
    "that is True": TRUE,
    "that is a text": text("6"),
    "that is nothing": NONE,
}
NUMELS = (
    *(
        of_weight(
            f"a count {name}",
            72,
            "a count that the record does not have",
            tensor(storage(numel=count)),
        )
        for name, count in _NUMELS.items()
    ),
    of_records("a short record", 72, "20 bytes for 24", **{"0": W_BYTES[:20]}),
    of_records("a long record", 72, "28 bytes for 24", **{"0": W_BYTES + bytes(4)}),
    of_records("an empty record", 72, "nothing for 24", **{"0": b""}),
    of_records("no record", 72, "a storage without a record", **{"0": b"gone"}),
    of_weight(
        "two counts of one storage",
        72,
        "one storage of 6 and of 12 elements",
        tensor(storage("1", 6, glob("torch", "HalfStorage")), 0, ints(6), ints(1)),
    ),
)
_KEYS: Mapping[str, bytes] = {
    "that climbs": text("../../x"),
    "that climbs back": text("../data/0"),
    "that is absolute": text("/etc/passwd"),
    "that is empty": text(""),
    "that is a number": number(0),
    "that is nothing": NONE,
    "that is a tuple": items(text("0")),
    "of escapes": text("\x1b[2J"),
    "of 1 MB": text("0" * MIB),
    "that is the pickle's": text("../data.pkl"),
}
IDS = (
    *(
        of_weight(f"a key {name}", 80, "a key that is no record", tensor(storage(key)))
        for name, key in _KEYS.items()
    ),
    *(
        of_weight(
            f"an id that is {name}", 80, "a persistent id of no storage", tensor(opcodes + PERSID)
        )
        for name, opcodes in {
            "a number": number(1),
            "a text": text("storage"),
            "nothing": NONE,
            "an empty tuple": b")",
            "too short": items(text("storage"), FLOATS, text("0")),
            "too long": items(text("storage"), FLOATS, text("0"), text("cpu"), *[number(6)] * 4),
            "of another kind": items(text("module"), FLOATS, text("0"), text("cpu"), number(6)),
            "a list": listed(text("storage"), FLOATS, text("0"), text("cpu"), number(6)),
            "of no kind": items(number(1), FLOATS, text("0"), text("cpu"), number(6)),
        }.items()
    ),
    *(
        of_weight(f"a storage of {name}", 80, "a storage of no dtype", tensor(storage(kind=kind)))
        for name, kind in {
            "an unknown class": glob("torch", "SecretStorage"),
            "another module": glob("os", "FloatStorage"),
            "a function": glob("torch", "load"),
            "a text": text("FloatStorage"),
            "nothing": NONE,
        }.items()
    ),
)

# ---------------------------------------------------------------------------- 75, 76: views


def view(offset: int, shape: bytes, strides: bytes) -> bytes:
    """A view of the storage of six."""
    return tensor(storage(), offset, shape, strides)


VIEWS = tuple(
    of_weight(name, 75, "a view that leaves its storage", opcodes)
    for name, opcodes in {
        "an offset too large": view(1, ints(2, 3), ints(3, 1)),
        "a negative offset": view(-1, ints(2, 3), ints(3, 1)),
        "an offset of 2^63": view(1 << 63, ints(1), ints(1)),
        "a stride too large": view(0, ints(2, 3), ints(4, 1)),
        "a stride of 2^62": view(0, ints(2, 3), ints(1 << 62, 1)),
        "a negative stride": view(5, ints(6), ints(-1)),
        "a shape too large": view(0, ints(7), ints(1)),
        "a negative dimension": view(0, ints(-2, 3), ints(3, 1)),
        "two negative dimensions": view(0, ints(-2, -3), ints(3, 1)),
        "a shape that wraps around": view(0, ints(1 << 62, 4), ints(4, 1)),
        "nothing times 2^62": view(0, ints(0, 1 << 62, 4), ints(1, 1, 1)),
        "71 dimensions": view(0, ints(*[1] * 71), ints(*[1] * 71)),
    }.items()
)


def of_view(name: str, what: str, opcodes: bytes, ends: Ends, value: np.ndarray | None) -> Attack:
    """Return an attack whose tensor ``w`` is a view that says an element many times."""
    values = None if value is None else {"b": B, "w": value}
    return of_weight(name, 76, what, opcodes, ends)._replace(values=values)


EXPANDED = (
    of_weight(
        "nothing behind the end", 75, "an empty view", view(7, ints(0), ints(1)), READ
    )._replace(values={"b": B, "w": np.zeros(0, np.float32)}),
    of_view(
        "4 bytes said a trillion times",
        "4 TB out of one element",
        view(0, ints(1 << 20, 1 << 20), ints(0, 0)),
        Ends(0, 0, 0, 12),
        None,
    ),
    of_view(
        "an element said 12 times",
        "a stride of nothing",
        view(2, ints(3, 4), ints(0, 0)),
        READ,
        np.full((3, 4), 3, np.float32),
    ),
    of_view(
        "rows that overlap",
        "elements said twice",
        view(0, ints(4, 3), ints(1, 1)),
        READ,
        np.lib.stride_tricks.sliding_window_view(W.reshape(-1), 3).copy(),
    ),
)

# ---------------------------------------------------------------------------- 86: other kinds


def opaque(name: str, opcodes: bytes, **records: bytes) -> Attack:
    """Return an attack that is a run with one more thing in its model, which is no tensor to us."""
    pickle = checkpoint(model=((text("w"), tensor()), (text("x"), opcodes)))
    content = torch_file(pickle, {**RECORDS, **records})
    return of_bytes(name, 86, "a tensor of another kind", content, ends=READ, values=SOUND)


_LAYOUT = reduce(glob("torch.serialization", "_get_layout"), text("torch.sparse_coo"))
_META = reduce(
    glob("torch._utils", "_rebuild_meta_tensor_no_storage"),
    *(glob("torch", "float32"), ints(2, 3), ints(3, 1), FALSE),
)
KINDS = (
    opaque(
        "sparse",
        reduce(
            glob("torch._utils", "_rebuild_sparse_tensor"),
            _LAYOUT,
            items(tensor(), tensor(), reduce(glob("torch", "Size"), ints(2, 3)), FALSE),
        ),
    ),
    opaque(
        "quantized",
        reduce(
            glob("torch._utils", "_rebuild_qtensor"),
            *(storage("2", 6, glob("torch", "QInt8Storage")), number(0), ints(2, 3), ints(3, 1)),
            *(items(glob("torch", "per_tensor_affine"), real(0.1), number(0)), FALSE, HOOKS),
        ),
        **{"2": bytes(6)},
    ),
    opaque("meta", _META),
    opaque(
        "a subclass",
        reduce(
            glob("torch._tensor", "_rebuild_from_type_v2"),
            *(glob("torch._utils", "_rebuild_tensor_v2"), glob("torch", "Tensor")),
            items(storage(), number(0), ints(2, 3), ints(3, 1), FALSE, HOOKS),
            mapping((text("note"), text("an attribute"))),
        ),
    )._replace(values={"x": W, **SOUND}),
)
CALLING_TYPE = of_value(
    "a subclass that calls",
    71,
    "a rebuild function that is none",
    lambda command: reduce(
        glob("torch._tensor", "_rebuild_from_type_v2"),
        *(glob("os", "system"), glob("torch", "Tensor"), items(text(command)), mapping()),
    ),
    REFUSED,
    "os.system",
)
STORAGE_ATTACKS = (*NUMELS, *IDS, *VIEWS, *EXPANDED, *KINDS, CALLING_TYPE)

"""Pickles as torch.save writes them, and pickles put together opcode by opcode."""

from __future__ import annotations

import base64
import itertools
import json
import pickletools
import random
import struct
from pathlib import Path
from typing import Any

_GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "torch_pickles.json").read_text(encoding="utf-8")
)
# By name, from PyTorch itself; "stream" is a whole file of its older format.
PICKLES: dict[str, bytes] = {
    name: base64.b64decode(text) for name, text in _GOLDEN["pickles"].items()
}
# The full names that torch.load(weights_only=True) accepts.
ACCEPTED: list[str] = _GOLDEN["accepted"]


# ---------------------------------------------------------------------------- pieces


def pickle_of(*pieces: bytes) -> bytes:
    """Return a pickle of protocol 2 made of opcodes."""
    return b"\x80\x02" + b"".join(pieces) + b"."


def name(module: str, attribute: str) -> bytes:
    """Push a name."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """Push a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Push an integer of any size up to 255 bytes."""
    length = (value.bit_length() >> 3) + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def tuple_of(*pieces: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(pieces) + b"t"


def list_of(*pieces: bytes) -> bytes:
    """Push a list."""
    return b"](" + b"".join(pieces) + b"e"


def dict_of(*pieces: bytes) -> bytes:
    """Push a dict of keys and values in turn."""
    return b"}(" + b"".join(pieces) + b"u"


def call(module: str, attribute: str, *args: bytes) -> bytes:
    """Call a name."""
    return name(module, attribute) + tuple_of(*args) + b"R"


HOOKS = call("collections", "OrderedDict")
FLOATS = name("torch", "FloatStorage")
BYTES = name("torch.storage", "UntypedStorage")


def storage(kind: bytes = FLOATS, key: bytes = text("0"), numel: bytes = number(6)) -> bytes:
    """Push a storage."""
    return tuple_of(text("storage"), kind, key, text("cpu"), numel) + b"Q"


def numbers(*values: int) -> bytes:
    """Push a tuple of integers."""
    return tuple_of(*map(number, values))


def tensor(
    held: bytes = storage(),
    offset: bytes = number(0),
    shape: bytes = numbers(2, 3),
    strides: bytes = numbers(3, 1),
    requires_grad: bytes = b"\x89",
    hooks: bytes = HOOKS,
    *more: bytes,
    version: str = "_v2",
) -> bytes:
    """Push a tensor; by default one of two rows and three columns."""
    args = [held, offset, shape, strides, requires_grad, hooks, *more]
    return call("torch._utils", f"_rebuild_tensor{version}", *args)


# ---------------------------------------------------------------------------- random


def tree(rng: random.Random, depth: int = 4) -> Any:
    """Return random plain data, in which some objects stand twice."""
    made = [_branch(rng, depth, []) for _ in range(3)]
    return [made, made, "end"]


def _branch(rng: random.Random, depth: int, seen: list[Any]) -> Any:
    if depth == 0 or rng.random() < 0.3:
        node = _leaf(rng)
    elif seen and rng.random() < 0.15:
        return rng.choice(seen)
    else:
        inner = [_branch(rng, depth - 1, seen) for _ in range(rng.randrange(6))]
        node = rng.choice([list, tuple, _mapping])(inner)
    seen.append(node)
    return node


def _mapping(values: list[Any]) -> dict[Any, Any]:
    return {f"key {place}" if place % 2 else place * 100: v for place, v in enumerate(values)}


def _leaf(rng: random.Random) -> Any:
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.randrange(-(1 << rng.randrange(1, 300)), 1 << rng.randrange(1, 300))
    if kind == 2:
        return rng.choice([0.0, -1.5, 1e300, float("inf")])
    if kind == 3:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    if kind == 4:
        return complex(rng.random(), -1.0)
    if kind == 5:
        return bytearray(b"\x00\xff" * rng.randrange(3))
    if kind == 6:
        return set(range(rng.randrange(5)))
    return "".join(rng.choice("aé漢\U0001f600\udc80 .") for _ in range(rng.randrange(2, 12)))


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """Return a pickle with some bytes changed, or with some opcodes moved about."""
    if rng.random() < 0.4:
        return _mutate_bytes(rng, bytearray(raw))
    starts = [at or 0 for _, _, at in pickletools.genops(raw)] + [len(raw)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.randrange(1, 4)):
        here, there = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        kind = rng.randrange(4)
        if kind == 0:
            del pieces[here]
        elif kind == 1:
            pieces.insert(here, pieces[there])
        elif kind == 2:
            pieces[here] = pieces[there]
        else:
            pieces[here], pieces[there] = pieces[there], pieces[here]
    return b"".join(pieces)


def _mutate_bytes(rng: random.Random, raw: bytearray) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(raw))
        kind = rng.randrange(4)
        if kind == 0:
            raw[at] = rng.randrange(256)
        elif kind == 1:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del raw[at : at + rng.randrange(1, 9)]
        else:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
    return bytes(raw)

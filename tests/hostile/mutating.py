"""Mutated checkpoints, read: a program that tells of everything that is none of our errors.

``mutating.py KIND FIRST COUNT`` reads so many mutants of a kind; the mutant of a number is always
the same. It writes a line of JSON per surprise, and a last one that counts.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hdf5_making import sound as fill_hdf5
from keras_attacks import keras_file, model, weights
from npz_attacks import member, npy, said
from raw_pickle import (
    checkpoint,
    glob,
    items,
    legacy_checkpoint,
    legacy_file,
    listed,
    mapping,
    members,
    number,
    real,
    reduce,
    storage,
    tensor,
    text,
)
from raw_zip import Part, archive, deflated

ADDRESSES = 3 << 30
PATIENCE = 60  # seconds
INTERESTING = (0, 1, 2, 7, 8, 16, 63, 64, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 16)
HUGE = ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
STEM = "model-step-300"


# ---------------------------------------------------------------------------- what is mutated


def npz_members() -> list[tuple[bytes, bytes]]:
    """Return names and contents of the members of a small npz file."""
    w = np.float32([[1, 2, 3], [4, 5, 6]])
    fortran = npy(said("'>f8'", "True", "(2, 3)"), w.astype(">f8").tobytes("F"))
    named = {"w": member(w), "a/b": member(np.float16([1, 2])), "f": fortran}
    return [(name.encode() + b".npy", content) for name, content in named.items()]


def pickled() -> bytes:
    """Return a pickle with a little of everything."""
    scalar = reduce(
        glob("numpy._core.multiarray", "scalar"),
        reduce(glob("numpy", "dtype"), text("f8"), b"\x89", b"\x88"),
        reduce(glob("_codecs", "encode"), text("\0\0\0\0\0\0\xf0?"), text("latin1")),
    )
    namespace = glob("argparse", "Namespace") + b")\x81" + mapping((text("lr"), real(0.1))) + b"b"
    view = tensor(storage(), 1, items(number(2)), items(number(2)))
    return checkpoint(
        (text("args"), namespace),
        (text("metrics"), listed(scalar, number(1 << 40), b"\x88", b"N", view)),
    )


SMALL_HDF5 = weights(fill_hdf5)


def chunked() -> bytes:
    """Return an HDF5 file of every layout."""

    def fill(file: Any) -> None:
        fill_hdf5(file)
        file.create_dataset("layers/c/vars/0", data=np.arange(64.0), chunks=(16,), compression=9)
        file["layers/c/vars/0"].attrs["name"] = "kernel"

    return weights(fill)


CHUNKED = chunked()


# ---------------------------------------------------------------------------- how


def integer(chance: random.Random, raw: bytes) -> int:
    """Return a number that lengths are when they lie."""
    near = len(raw) + chance.choice((-1, 0, 1))
    return chance.choice((*INTERESTING, *HUGE, near, chance.getrandbits(64)))


def one_change(raw: bytearray, chance: random.Random) -> None:
    """Change something of a file, in place."""
    if not raw:
        return
    at = chance.randrange(len(raw))
    kind = chance.randrange(8)
    n = chance.choice((1, 1, 2, 4, 8, 16, 64))
    if kind <= 1:
        raw[at] ^= 1 << chance.randrange(8)
    elif kind == 2:
        raw[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    elif kind == 3:
        width = chance.choice((1, 2, 4, 8))
        value = integer(chance, raw) & (1 << 8 * width) - 1
        raw[at : at + width] = value.to_bytes(width, chance.choice(("little", "little", "big")))
    elif kind == 4:
        start = chance.randrange(len(raw))
        raw[at : at + n] = raw[start : start + n]
    elif kind == 5:
        start = chance.randrange(len(raw))
        raw[at:at] = raw[start : start + n]
    elif kind == 6:
        del raw[at : at + n]
    else:
        width = chance.choice((2, 4, 8))
        value = int.from_bytes(raw[at : at + width], "little") + chance.choice((-8, -1, 1, 8))
        raw[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")


def changed(raw: bytes, chance: random.Random) -> bytes:
    """Return a file changed in one to eight places, or cut."""
    if chance.random() < 0.05:
        return raw[: chance.randrange(len(raw))]
    made = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        one_change(made, chance)
    return bytes(made)


class Mutant(NamedTuple):
    """A changed file, and whether checksums of its format cover all that was changed."""

    content: bytes
    covered: bool


def npz(chance: random.Random) -> Mutant:
    """Return a mutant npz file; of every second, only one member is changed, and resealed."""
    inner = chance.random() < 0.5
    named = npz_members()
    hit = chance.randrange(len(named)) if inner else -1
    parts = []
    for k, (name, content) in enumerate(named):
        made = changed(content, chance) if k == hit else content
        parts.append(deflated(name, made) if chance.random() < 0.3 else Part(name, made))
    raw = archive(parts, end64={} if chance.random() < 0.3 else None)
    return Mutant(raw if inner else changed(raw, chance), not inner)


def torch(chance: random.Random) -> Mutant:
    """Return a mutant torch file; of two in three, only the pickle is changed, and resealed."""
    pickle = pickled()
    if chance.random() < 0.67:
        return Mutant(archive(members(changed(pickle, chance))), False)
    return Mutant(changed(archive(members(pickle)), chance), True)


def legacy(chance: random.Random) -> Mutant:
    """Return a mutant file in torch's stream format."""
    more = (text("args"), mapping((text("lr"), real(0.1))))
    return Mutant(changed(legacy_file(legacy_checkpoint(more)), chance), False)


def hdf5(chance: random.Random) -> Mutant:
    """Return a mutant HDF5 file."""
    return Mutant(changed(chance.choice((SMALL_HDF5, CHUNKED)), chance), False)


def keras(chance: random.Random) -> Mutant:
    """Return a mutant .keras file; of two in three, one member is changed, and resealed."""
    layers = [{"class_name": "BatchNormalization", "config": {"name": "bn"}}]
    config = json.dumps(model(*layers)).encode()
    which = chance.randrange(3)
    inside = changed(CHUNKED, chance) if which == 0 else CHUNKED
    config = changed(config, chance) if which == 1 else config
    raw = keras_file(config, [Part(b"model.weights.h5", inside)])
    return Mutant(changed(raw, chance), True) if which == 2 else Mutant(raw, False)


KINDS: Mapping[str, tuple[str, Callable[[random.Random], Mutant]]] = {
    "npz": (".npz", npz),
    "torch": (".pt", torch),
    "legacy": (".pt", legacy),
    "hdf5": (".h5", hdf5),
    "keras": (".keras", keras),
}


def mutant(kind: str, ordinal: int) -> Mutant:
    """Return the mutant of a number."""
    return KINDS[kind][1](random.Random(f"{kind} {ordinal}"))


# ---------------------------------------------------------------------------- what comes of it


class Hangs(BaseException):
    """A mutant takes longer than it may."""


def _too_long(*_: object) -> None:
    raise Hangs


def contents(path: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every tensor of a checkpoint. Raises `EmaError`."""
    from ema_cli.reading import Values

    values = Values(path)
    found = {}
    for name, (dtype, shape) in values.specs.items():
        with values.open(name) as reader:
            if reader.elements > 1 << 20:
                continue  # a shape that says one element a billion times
            found[name] = (dtype.name, shape, reader.block(0, reader.elements).tobytes())
    return found


def outcome(path: str, sound: Mapping[str, object]) -> str:
    """Return ``refused``, ``empty``, ``same``, ``other``, or what a surprise reading a file is."""
    from ema_cli.errors import EmaError

    try:
        found = contents(path)
    except EmaError as error:
        plain = error.message.isprintable() and type(error) is not EmaError
        return "refused" if plain else f"surprise: {type(error).__name__}: {error.message!r}"
    except BaseException as error:  # that is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"surprise: {error!r:.200} in {where.filename}:{where.lineno}"
    if not found:
        return "empty"
    return "same" if found == sound else "other"


def main(kind: str, first: int, count: int) -> None:
    """Read mutants and tell of each surprise."""
    suffix, _ = KINDS[kind]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    signal.signal(signal.SIGALRM, _too_long)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    told: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{STEM}{suffix}")
        Path(path).write_bytes(untouched(kind))
        sound = contents(path)
        for ordinal in range(first, first + count):
            content, covered = mutant(kind, ordinal)
            Path(path).write_bytes(content)
            signal.alarm(PATIENCE)
            came = outcome(path, sound)
            signal.alarm(0)
            if covered and came == "other":
                came = "surprise: other values under the same checksums"
            told[came.partition(":")[0]] += 1
            if came.startswith("surprise"):
                print(json.dumps({"mutant": ordinal, "came": came}), flush=True)
    # Not ru_maxrss, which begins with what the process had that started this one.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
    helper = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"counts": told, "peak": peak, "helper": helper}))


def untouched(kind: str) -> bytes:
    """Return the file whose mutants these are."""
    files: Mapping[str, Callable[[], bytes]] = {
        "npz": lambda: archive([Part(name, content) for name, content in npz_members()]),
        "torch": lambda: archive(members(pickled())),
        "legacy": lambda: legacy_file(legacy_checkpoint()),
        "hdf5": lambda: CHUNKED,
        "keras": lambda: keras_file(model(), [Part(b"model.weights.h5", CHUNKED)]),
    }
    return files[kind]()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""Attacks 96, 98 and 99 on HDF5 files, byte by byte, and on what Keras puts around them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from attacks import LATE, READ, REFUSED, STEM, Attack, Ends, Values, writing
from hdf5_attacks import HDF5_ATTACKS
from hdf5_making import H5, SOUND, VARS, B, W, sound
from raw_zip import MIB, Part, archive, deflated, zeros

KERAS = ".keras"


def weights(fill: Callable[[Any], None] = sound, **options: Any) -> bytes:
    """Return an HDF5 file."""
    out = io.BytesIO()
    with h5py.File(out, "w", **options) as file:
        fill(file)
    return out.getvalue()


_WHOLE = weights()


def of_bytes(name: str, item: int, what: str, content: bytes, ends: Ends = REFUSED) -> Attack:
    """Return an attack that is these bytes."""
    return Attack(name, (item,), what, writing(H5, content), ends, (), SOUND)


def patched(find: bytes, put: bytes, at: int = 0, content: bytes = _WHOLE) -> bytes:
    """Return a file in which bytes after the first find of some others are replaced."""
    begin = content.index(find) + at
    return content[:begin] + put + content[begin + len(put) :]


def u64(*values: int) -> bytes:
    """Return little-endian numbers of 8 bytes."""
    return b"".join((value & (1 << 64) - 1).to_bytes(8, "little") for value in values)


def _places() -> dict[str, int]:
    with h5py.File(io.BytesIO(_WHOLE), "r") as file:
        return {name: file[f"{VARS}/{name}"].id.get_offset() for name in "01"}


_AT = _places()
_LAYOUT = u64(_AT["0"], W.nbytes)
_SHAPE = u64(*W.shape)
_TREE = _WHOLE.index(b"TREE")
_EOF = u64(len(_WHOLE))
BROKEN = (
    of_bytes("half a file", 96, "cut in the middle", _WHOLE[: len(_WHOLE) // 2]),
    of_bytes("all but a byte", 96, "cut at the end", _WHOLE[:-1]),
    of_bytes("a signature", 96, "8 bytes", _WHOLE[:8]),
    of_bytes("bytes behind it", 96, "what HDF5 does not look at", _WHOLE + bytes(512), READ),
    of_bytes("a smaller end", 99, "an end of file before the data", patched(_EOF, u64(1000))),
    of_bytes("a larger end", 99, "an end of file behind the file", patched(_EOF, u64(1 << 40))),
    of_bytes("data behind the end", 99, "an address outside", patched(_LAYOUT, u64(1 << 40))),
    of_bytes("data at 2^64 - 2", 99, "an address outside", patched(_LAYOUT, u64(-2))),
    of_bytes(
        "data that end outside", 99, "an address at the end", patched(_LAYOUT, u64(len(_WHOLE) - 8))
    ),
    of_bytes(
        "data that were never written", 99, "fill values", patched(_LAYOUT, u64(-1)), READ
    )._replace(values={**SOUND, f"{VARS}/0": np.zeros_like(W)}),
    of_bytes("data in the header", 99, "the superblock for data", patched(_LAYOUT, u64(0))),
    of_bytes(
        "data of another", 99, "two datasets that overlap", patched(_LAYOUT, u64(_AT["1"] - 4))
    ),
    of_bytes("less data than shape", 99, "8 bytes for 24", patched(_LAYOUT, u64(8), 8)),
    of_bytes("more data than shape", 99, "2^40 bytes for 24", patched(_LAYOUT, u64(1 << 40), 8)),
    of_bytes(
        "a shape of 2^60", 99, "a shape that is not its data's", patched(_SHAPE, u64(1 << 60))
    ),
    of_bytes("a shape that wraps around", 99, "2^62 times 4", patched(_SHAPE, u64(1 << 62, 4))),
    of_bytes("a smaller shape", 99, "a shape that is not its data's", patched(_SHAPE, u64(1))),
    of_bytes(
        "a tree that is its own neighbour",
        99,
        "a loop",
        patched(b"TREE", u64(_TREE, _TREE), 8),
        Ends(12, -1, -1, 12),
    ),
    of_bytes("a tree of 65,535", 99, "a count that lies", patched(b"TREE", b"\xff\xff", 6)),
    of_bytes("a tree of 255 levels", 99, "a depth that lies", patched(b"TREE", b"\xff", 5)),
    of_bytes(
        "a tree of itself", 99, "a child that is its parent", patched(b"TREE", u64(_TREE), 32)
    ),
    of_bytes("a heap of 2^60", 99, "a size that lies", patched(b"HEAP", u64(1 << 60), 8)),
    of_bytes("a heap elsewhere", 99, "an address outside", patched(b"HEAP", u64(1 << 60), 24)),
    of_bytes("a heap whose free list loops", 99, "a loop", patched(b"HEAP", u64(0), 16)),
    of_bytes("a node of 65,535", 99, "a count that lies", patched(b"SNOD", b"\xff\xff", 6)),
    of_bytes("a node of version 9", 99, "a version nobody knows", patched(b"SNOD", b"\t", 4)),
    of_bytes("superblock 9", 99, "a version nobody knows", patched(b"\x89HDF", b"\t", 8)),
    of_bytes("addresses of 255 bytes", 99, "a width nobody has", patched(b"\x89HDF", b"\xff", 13)),
    of_bytes(
        "a base address",
        99,
        "addresses that count from elsewhere",
        patched(b"\x89HDF", u64(512), 24),
    ),
    of_bytes("a root elsewhere", 99, "an address outside", patched(b"\x89HDF", u64(1 << 50), 64)),
    Attack(
        "a block before it",
        (99,),
        "a user block: read all the same",
        writing(H5, weights(userblock_size=1024)),
        READ,
        (),
        SOUND,
    ),
)

# ---------------------------------------------------------------------------- 98: what Keras adds

_LAMBDA = {
    "class_name": "Lambda",
    "module": "keras.layers",
    "config": {
        "name": "dense",
        "function": {
            "class_name": "__lambda__",
            "config": {"code": "4wEAAAAAAAAA", "defaults": None},
        },
    },
}
_CALL = {
    "class_name": "function",
    "module": "builtins",
    "config": "exec",
    "registered_name": "function",
    "inbound_nodes": [{"args": ["import os; os.system('true')"], "kwargs": {}}],
}


def model(*layers: Any, **more: Any) -> dict[str, Any]:
    """Return the config of a model."""
    return {
        "class_name": "Sequential",
        "module": "keras",
        "config": {"name": "s", "layers": layers},
        **more,
    }


def keras_file(config: bytes | Any, parts: list[Part] | None = None) -> bytes:
    """Return a .keras file with this config."""
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    made = [Part(b"metadata.json", b'{"keras_version": "3.15.1"}'), Part(b"config.json", raw)]
    return archive([*made, *(parts or [Part(b"model.weights.h5", _WHOLE)])])


def of_keras(
    name: str,
    item: int,
    what: str,
    config: Any = None,
    parts: list[Part] | None = None,
    ends: Ends = REFUSED,
    values: Values = SOUND,
) -> Attack:
    """Return an attack that is a .keras file."""
    content = keras_file(model() if config is None else config, parts)
    return Attack(name, (item,), what, writing(KERAS, content), ends, (), values)


_DEEP = b'{"config":' * 5000 + b"1" + b"}" * 5000
CONFIGS = (
    of_keras("a Lambda", 98, "code in a layer: never looked at", model(_LAMBDA), ends=READ),
    of_keras("a call", 98, "a function of any module: never looked up", model(_CALL), ends=READ),
    of_keras(
        "a module of any name",
        98,
        "a class of any module: never imported",
        {"class_name": "system", "module": "os", "config": {"command": "true"}},
        ends=READ,
    ),
    of_keras(
        "a normalisation that calls",
        98,
        "a class we know by name, from a module we do not",
        model({"class_name": "BatchNormalization", "module": "os", "config": _LAMBDA}),
        ends=READ,
    ),
    *(
        of_keras(f"a config that is {name}", 98, "a config that is none", config)
        for name, config in {
            "no JSON": b"import os",
            "empty": b"",
            "no text": b"\xff\xfe{}",
            "5,000 deep": _DEEP,
            "5,000 lists deep": b"[" * 5000 + b"]" * 5000,
            "a number": b"1",
            "a list": b"[]",
            "null": b"null",
            "a number of 5,000 digits": b'{"config":' + b"9" * 5000 + b"}",
        }.items()
    ),
    *(
        of_keras(f"a config that is {name}", 98, "a config that tells nothing", config, ends=READ)
        for name, config in {
            "NaN": b'{"config":NaN}',
            "twice": b'{"config":{},"config":1}',
            "without layers": b'{"config":{}}',
            "a number of layers": b'{"class_name":"Sequential","config":{"layers":7}}',
            "a layer that is a text": b'{"config":{"layers":["x"]}}',
            "a layer whose name is a list": b'{"config":{"layers":[{"config":{"name":[]}}]}}',
            "a layer whose class is a mapping": b'{"config":{"layers":[{"class_name":{}}]}}',
            "a name with a surrogate": b'{"config":{"layers":[{"config":{"name":"\\ud800"}}]}}',
        }.items()
    ),
)
_PARTS = [Part(b"model.weights.h5", _WHOLE)]


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, w=W, b=B)
    return out.getvalue()


def _linked(file: Any) -> None:
    sound(file)
    file["layers/more"] = h5py.ExternalLink("/etc/hostname", "/")


def _outside(file: Any) -> None:
    sound(file)
    file.create_dataset("layers/more/vars/0", (4,), "<f4", external=[("/etc/hostname", 0, 16)])


CONTAINERS = (
    of_keras("no weights", 98, "a config alone", parts=[Part(b"assets/x", b"x")]),
    of_keras("two weights", 54, "two members of one name", parts=_PARTS * 2),
    of_keras(
        "weights elsewhere", 55, "a name that climbs", parts=[Part(b"../model.weights.h5", _WHOLE)]
    ),
    of_keras(
        "two kinds of weights",
        82,
        "which of them counts? To Keras the first kind",
        parts=[*_PARTS, Part(b"model.weights.npz", _npz())],
        ends=READ,
    ),
    of_keras(
        "weights that are a bomb",
        44,
        "250 kB that inflate to 256 MiB",
        parts=[Part(b"model.weights.h5", zeros(256), 8, crc=0, size=256 * MIB)],
    ),
    of_keras(
        "weights that are no HDF5",
        48,
        "a pickle",
        parts=[Part(b"model.weights.h5", b"\x80\x04cos\nsystem\n.")],
    ),
    of_keras(
        "a flipped byte",
        58,
        "a CRC that is not its data's",
        parts=[Part(b"model.weights.h5", _WHOLE, crc=1)],
        ends=LATE,
    ),
    of_keras(
        "deflated weights",
        84,
        "weights that cannot be read in place: read all the same",
        parts=[deflated(b"model.weights.h5", _WHOLE)],
        ends=READ,
    ),
    of_keras(
        "assets that climb",
        55,
        "files that nobody takes out",
        parts=[*_PARTS, Part(b"assets/../../../tmp/evil", b"x")],
        ends=READ,
    ),
    of_keras("a config of 1 MB of spaces", 98, "says nothing", b" " * MIB + b"{}", ends=READ),
    of_keras(
        "an external link of weights",
        87,
        "a link out of the weights",
        parts=[Part(b"model.weights.h5", weights(_linked))],
    ),
    of_keras(
        "external storage of weights",
        88,
        "bytes of any file",
        parts=[Part(b"model.weights.h5", weights(_outside))],
    ),
)


# ---------------------------------------------------------------------------- Keras before 3


def legacy(config: Any, **attributes: Any) -> Callable[[Path], Path]:
    """Return a builder of a whole model as Keras wrote it before version 3."""

    def build(folder: Path) -> Path:
        path = folder / f"{STEM}.h5"
        with h5py.File(path, "w") as file:
            file.attrs["keras_version"] = "2.15.0"
            file.attrs["model_config"] = config if isinstance(config, bytes) else json.dumps(config)
            group = file.create_group("model_weights")
            group.attrs["layer_names"] = [b"dense"]
            layer = group.create_group("dense")
            layer.attrs["weight_names"] = [b"dense/kernel:0", b"dense/bias:0"]
            layer["dense/kernel:0"], layer["dense/bias:0"] = W, B
            for name, value in attributes.items():
                (layer if name == "weight_names" else group).attrs[name] = value
        return path

    return build


_DENSE = "model_weights/dense/dense"
LEGACY: Values = {f"{_DENSE}/kernel:0": W, f"{_DENSE}/bias:0": B}


def of_legacy(name: str, what: str, config: Any, ends: Ends = REFUSED, **attributes: Any) -> Attack:
    """Return an attack that is a file of Keras before version 3."""
    return Attack(name, (98,), what, legacy(config, **attributes), ends, (), LEGACY)


OLD = (
    of_legacy("an old Lambda", "code in a layer: never looked at", model(_LAMBDA), READ),
    of_legacy("an old config that is no JSON", "a config that is none", b"import os"),
    of_legacy("an old config of depth", "a config without end", _DEEP),
    of_legacy(
        "layer names that are numbers", "names that are none", model(), READ, layer_names=[1, 2]
    ),
    of_legacy(
        "layer names of nothing", "a group that is not there", model(), READ, layer_names=[b"gone"]
    ),
    of_legacy(
        "layer names that climb",
        "a path for a name",
        model(),
        READ,
        layer_names=[b"../model_weights/dense"],
    ),
    of_legacy(
        "layer names from the root",
        "a path for a name",
        model(),
        READ,
        layer_names=[b"/model_weights/dense"],
    ),
    of_legacy(
        "a layer name twice", "a layer that counts twice", model(), READ, layer_names=[b"dense"] * 2
    ),
    of_legacy(
        "weight names of nothing",
        "a dataset that is not there",
        model(),
        READ,
        weight_names=[b"gone:0"],
    ),
    of_legacy(
        "weight names that are no text",
        "bytes for a name",
        model(),
        READ,
        weight_names=[b"\xff\xfe"],
    ),
    of_legacy(
        "a weight name of a group", "a group for a dataset", model(), READ, weight_names=[b"dense"]
    ),
)
KERAS_ATTACKS = (*HDF5_ATTACKS, *BROKEN, *CONFIGS, *CONTAINERS, *OLD)

"""Pickles written as torch.save would write them, and what of a tree can be written."""

from __future__ import annotations

import pickle
import pickletools
import random
from collections import OrderedDict
from typing import Any

import pytest
from torch_pickles import PICKLES, call, list_of, name, number, pickle_of, storage, text, tree

from ema_cli.errors import UnsupportedInput
from ema_cli.formats.torch import plain as plain_module
from ema_cli.formats.torch.encoding import encode, plain
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Global, Opaque, Ordered, StorageRef, TensorRef

# What the loader of PyTorch 2.13 takes; anything else it calls an unsupported operand.
ACCEPTED_OPCODES = (
    "PROTO GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET NONE NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT "
    "LONG_BINPUT STOP"
)
# Written by torch.save in protocol 2, and accepted by its own loader.
OWN = ["checkpoint", "views", "dtypes", "parameters"]


def read(raw: bytes) -> Any:
    """Return what a pickle says."""
    return load(raw, "a.pt", "data.pkl")[0]


def facts(tensor: Any) -> tuple[Any, ...]:
    """Return all there is to a tensor."""
    return tuple(getattr(tensor, field) for field in TensorRef.__slots__)


@pytest.mark.parametrize("case", OWN)
def test_what_torch_wrote_is_written_byte_for_byte(case: str) -> None:
    """State of models with `_metadata` and tied weights, of optimizers, every kind of tensor."""
    assert encode(read(PICKLES[case])) == PICKLES[case]


@pytest.mark.parametrize("case", [*OWN, "checkpoint 4", "opaque"])
def test_only_opcodes_the_loader_takes(case: str) -> None:
    """Also where the source has those of protocol 4."""
    raw = encode(read(PICKLES[case]))
    assert {opcode.name for opcode, _, _ in pickletools.genops(raw)} <= {*ACCEPTED_OPCODES.split()}


def test_protocol_4_is_written_as_protocol_2() -> None:
    """And says the same as the same checkpoint saved in protocol 2."""
    root, other = read(PICKLES["checkpoint 4"]), read(PICKLES["checkpoint"])
    again = read(encode(root))
    assert {k: facts(t) for k, t in again["model"].items()} == {
        k: facts(t) for k, t in other["model"].items()
    }
    assert again["model"].attributes == other["model"].attributes
    assert again["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]


def test_plain_data_is_written_as_python_writes_it() -> None:
    """Random trees with shared parts, byte for byte."""
    rng = random.Random(4)
    for _ in range(150):
        made = tree(rng)
        assert encode(made) == pickle.dumps(made, 2)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 1002, 2000, 2001])
def test_batches(count: int) -> None:
    """The pickler writes a thousand at a time, and each kind of container ends differently."""
    names = [f"name {n}" for n in range(count)]
    pairs = [(n, None) for n in names]
    made = [names, dict(pairs), tuple(names)]
    assert encode(made) == pickle.dumps(made, 2)
    assert encode(Ordered(pairs)) == pickle.dumps(OrderedDict(pairs), 2)


def test_attributes_of_an_ordered_dict() -> None:
    """Come after its entries."""
    made: Any = OrderedDict(a=1)
    made.hint = [1]
    assert encode(Ordered({"a": 1}, {"hint": [1]})) == pickle.dumps(made, 2)


def test_integers() -> None:
    """At every edge between opcodes, up to the longest the loader takes."""
    edges = [0, 255, 256, 65535, 65536, *(1 << n for n in (31, 32, 63, 64, 127, 2038))]
    numbers = [sign * edge + d for edge in edges for d in (-1, 0, 1) for sign in (1, -1)]
    assert encode(numbers) == pickle.dumps(numbers, 2)
    for longest in ((1 << 2039) - 1, -(1 << 2039)):
        assert read(encode([longest])) == [longest]
    for longer in (1 << 2039, -(1 << 2039) - 1):
        with pytest.raises(UnsupportedInput, match="256 bytes"):
            encode([longer])


def test_objects_that_are_data() -> None:
    """Devices, element types, counters, empty bytes."""
    root = read(PICKLES["numpy"])
    kept = {key: root[key] for key in ("counter", "device", "dtype", "size")}
    again = read(encode(kept | {"nothing": b""}))
    assert again["device"].callable == Global("torch", "device")
    assert again["device"].args == ("cuda", 1)
    assert again["counter"].args == ({"a": 2, "b": 1},)
    assert (again["dtype"], again["size"], again["nothing"]) == (kept["dtype"], (2, 3), b"")


def test_new_tensors() -> None:
    """Each way of making one, and keys of storages that are equal but not the same string."""
    whole = StorageRef("w" * 3, "float32", 6, "cpu")
    made = {
        "plain": TensorRef(whole, "float32", 0, (2, 3), (3, 1)),
        "tied": TensorRef(whole._replace(key="".join("www")), "float32", 3, (3,), (1,), True),
        "parameter": TensorRef(whole, "float32", 0, (), (), False, parameter=True),
        "u2": TensorRef(StorageRef("1", "", 4, "cpu"), "uint16", 0, (2,), (1,)),
        "conj": TensorRef(
            StorageRef("2", "complex64", 2, "cpu"), "complex64", 0, (2,), (1,), conj=True
        ),
    }
    raw = encode(made)
    again = read(raw)
    assert {k: facts(t) for k, t in again.items()} == {k: facts(t) for k, t in made.items()}
    assert raw.count(b"www") == 1
    with pytest.raises(UnsupportedInput, match="float16 in a storage of float32"):
        encode(TensorRef(whole, "float16", 0, (1,), (1,)))
    with pytest.raises(UnsupportedInput, match="a view of a storage"):
        encode(TensorRef(whole._replace(view=("0", 0, 6)), "float32", 0, (1,), (1,)))


def cycle() -> list[Any]:
    """Return a list that holds itself."""
    made: list[Any] = [1]
    made.append({"again": made})
    return made


def nested(depth: int) -> Any:
    """Return lists in each other."""
    made: list[Any] = []
    for _ in range(depth - 1):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (frozenset({1}), "a frozenset"),
        (Opaque(Global("argparse", "Namespace"), ()), "argparse.Namespace"),
        (Opaque(Global("os", "system"), ("ls",)), "os.system"),
        ({Global("os", "system"): 1}, "os.system"),
        (Opaque(Global("torch", "Tensor"), ((), {}), "newobj_ex"), "keyword arguments"),
        (Global("a\nb", "c"), "the name"),
        (cycle(), "what holds itself"),
        (nested(201), "deeper than 200"),
        (object(), "a object"),
    ],
)
def test_what_the_loader_would_refuse_is_refused(thing: Any, words: str) -> None:
    """Rather than written."""
    with pytest.raises(UnsupportedInput, match=words) as caught:
        encode(["first", thing])
    assert "weights_only" in caught.value.message


def test_as_deep_as_can_be_read() -> None:
    """What the machine reads can be written, at the limit too, whatever it is made of."""
    made: dict[type, Any] = {list: [], tuple: (1,), dict: {}, Ordered: Ordered()}
    for _ in range(198):
        made = {
            list: [made[list]],
            tuple: (made[tuple],),
            dict: {"a": made[dict]},
            Ordered: Ordered({"a": made[Ordered]}),
        }
    for thing in made.values():
        raw = encode([thing])
        assert encode(read(raw)) == raw
        assert encode(plain(read(raw))[0]) == raw
    with pytest.raises(UnsupportedInput, match="deeper than 200"):
        plain(nested(201))


# ---------------------------------------------------------------------------- plain


def test_what_is_plain_stays() -> None:
    """Nothing is left out of a checkpoint without objects, and its bytes stay the same."""
    for case in ("checkpoint", "views"):
        root, dropped = plain(read(PICKLES[case]))
        assert dropped == []
        assert encode(root) == PICKLES[case]


def test_objects_are_left_out_with_their_paths() -> None:
    """Whatever holds them: a dict, a list, a tuple, a set, an ordered dict, its attributes."""
    gone = Opaque(Global("argparse", "Namespace"), ())
    kept = TensorRef(StorageRef("0", "float32", 1, "cpu"), "float32", 0, (), ())
    root = {
        "args": gone,
        "model": Ordered({"w": kept, "x": gone}, {"_metadata": {"": gone}}),
        "list": [1, gone, 2],
        "tuple": (1, (gone, gone)),
        gone: 1,
        ("key", gone): 2,
        "frozen": frozenset({1}),
        "huge": 1 << 5000,
        "class": Global("my.code", "Net"),
        "dtype": Global("torch", "float16"),
        "storage": kept.storage,
        "device": Opaque(Global("torch", "device"), ("cpu",)),
        "odd device": Opaque(Global("torch", "device"), ([gone],)),
        "again": [gone],
    }
    made, dropped = plain(root)
    assert dropped == [
        "args",
        "model.x",
        "model._metadata.",
        "list.1",
        "tuple",
        "(Opaque)",
        "(tuple)",
        "frozen",
        "huge",
        "class",
        "storage",
        "odd device",
        "again.0",
    ]
    assert list(made) == ["model", "list", "dtype", "device", "again"]
    assert made["model"] == {"w": kept}
    assert made["model"].attributes == {"_metadata": {}}
    assert (made["list"], made["again"]) == ([1, 2], [])
    assert list(read(encode(made))) == list(made)
    assert root["list"][1] is gone


def test_attributes_of_tensors_are_left_out() -> None:
    """A tensor is kept without them, as often as it stands."""
    root = read(PICKLES["parameters"])
    made, dropped = plain([root, root])
    assert dropped == ["0.2.(attributes)", "0.3.(attributes)"]
    assert made[0] is made[1]
    assert made[0][0] is root[0]
    for place, tensor in enumerate(made[0]):
        expected = dict(zip(TensorRef.__slots__, facts(root[place]), strict=True))
        assert facts(tensor) == tuple((expected | {"attributes": None}).values())


def test_quantised_tensors_are_left_out() -> None:
    """They hold storages that are no tensor of ours."""
    assert plain(read(PICKLES["opaque"])) == ({}, ["quantised", "sparse", "meta"])


def test_cycles_are_cut() -> None:
    """Where they come back."""
    made, dropped = plain(cycle())
    assert made == [1, {}]
    assert dropped == ["1.again"]


def test_nothing_left() -> None:
    """Of an object there is nothing."""
    assert plain(Opaque(Global("a", "b"), ())) == (None, ["(everything)"])


def test_many_paths_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of millions of objects does not become a list of millions of paths."""
    monkeypatch.setattr(plain_module, "TOLD_LIMIT", 2)
    gone = Opaque(Global("a", "b"), ())
    assert plain([gone] * 5)[1] == ["0", "1", "and 3 more"]
    long = {"k" * 5000: {"\x1b[31m": gone}}
    (path,) = plain(long)[1]
    assert path.isprintable()
    assert len(path) < 400


def test_a_hostile_pickle_becomes_plain() -> None:
    """Calls go, data stays, and what is written mentions none of them."""
    raw = pickle_of(
        b"}(",
        text("run"),
        call("os", "system", text("ls")),
        text("list"),
        list_of(call("builtins", "eval", text("1")), number(7)),
        text("module"),
        name("sys", "modules"),
        text("storage"),
        storage(),
        b"u",
    )
    made, dropped = plain(read(raw))
    assert made == {"list": [7]}
    assert dropped == ["run", "list.0", "module", "storage"]
    assert load(encode(made), "a.pt", "data.pkl")[2] == []

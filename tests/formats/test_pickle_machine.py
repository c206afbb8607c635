"""The machine that reads pickles of PyTorch without running them."""

from __future__ import annotations

import base64
import pickle
import random
import struct
import time
from collections import OrderedDict
from typing import Any

import pytest
from torch_pickles import (
    FLOATS,
    HOOKS,
    PICKLES,
    call,
    dict_of,
    list_of,
    name,
    number,
    numbers,
    pickle_of,
    storage,
    tensor,
    text,
    tree,
    tuple_of,
)

from ema_cli.formats.torch.encoding import encode
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Global, Opaque, Ordered, StorageRef, TensorRef

F32 = "float32"


def read(raw: bytes) -> Any:
    """Return what a pickle says, which ends where its bytes do."""
    root, end, _ = load(raw, "a.pt", "data.pkl")
    assert end == len(raw)
    return root


def view(tensor: TensorRef) -> tuple[str, str, int, tuple[int, ...], tuple[int, ...]]:
    """Return what addresses the elements of a tensor."""
    return tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape, tensor.strides


# ---------------------------------------------------------------------------- what PyTorch writes


@pytest.mark.parametrize("case", ["checkpoint", "checkpoint 4", "checkpoint 5"])
def test_a_checkpoint(case: str) -> None:
    """Protocols 2, 4 and 5 say the same: tied weights, optimizer state, plain data."""
    root = read(PICKLES[case])
    model = root["model"]
    assert type(model) is Ordered
    assert {name: view(t) for name, t in model.items()} == {
        "embed.weight": ("0", F32, 0, (4, 2), (2, 1)),
        "norm.weight": ("1", F32, 0, (2,), (1,)),
        "norm.bias": ("2", F32, 0, (2,), (1,)),
        "norm.running_mean": ("3", F32, 0, (2,), (1,)),
        "norm.running_var": ("4", F32, 0, (2,), (1,)),
        "norm.num_batches_tracked": ("5", "int64", 0, (), ()),
        "head.weight": ("0", F32, 0, (4, 2), (2, 1)),
    }
    assert model["embed.weight"].storage == StorageRef("0", F32, 8, "cpu", None)
    assert model.attributes["_metadata"]["norm"] == {"version": 2}
    assert type(model.attributes["_metadata"]) is Ordered
    assert root["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert view(root["optimizer"]["state"][0]["exp_avg"])[1:] == (F32, 0, (4, 2), (2, 1))
    rest = {key: value for key, value in root.items() if key not in ("model", "optimizer")}
    assert rest == {
        "step": 300,
        "loss": 0.25,
        "seed": 1 << 70,
        "done": None,
        "raw": b"\x00\xff",
        "tags": {1, 2},
        "shape": (1, 2, 3, 4),
    }


def test_views() -> None:
    """Offsets, strides and the flags that make values differ from what is stored."""
    root = read(PICKLES["views"])
    assert {name: view(t)[1:] for name, t in root.items()} == {
        "channels_last": (F32, 0, (2, 3, 4, 5), (60, 1, 15, 3)),
        "slice": (F32, 3, (6,), (1,)),
        "transposed": (F32, 0, (6, 4), (1, 6)),
        "expanded": (F32, 0, (4, 3), (0, 1)),
        "empty": (F32, 0, (0, 3), (3, 1)),
        "scalar": (F32, 0, (), ()),
        "conj": ("complex64", 0, (2,), (1,)),
        "neg": (F32, 1, (2,), (2,)),
    }
    assert root["slice"].storage is not None
    assert root["slice"].storage == root["transposed"].storage
    assert [name for name, t in root.items() if t.conj] == ["conj"]
    assert [name for name, t in root.items() if t.neg] == ["neg"]


def test_element_types() -> None:
    """Each known type under our name; the others keep their storage inside an opaque object."""
    root = read(PICKLES["dtypes"])
    opaque = {name: root.pop(name) for name in ("complex32", "float4_e2m1fn_x2")}
    assert {name: t.dtype for name, t in root.items()} == {name: name for name in root}
    assert root["float8_e5m2"].storage == StorageRef("16", "", 2, "cpu")
    assert {
        name: t.storage.nbytes for name, t in root.items() if t.storage.nbytes < 4
    } == dict.fromkeys(
        [
            "int8",
            "uint8",
            "bool",
            "float8_e4m3fn",
            "float8_e5m2",
            "float8_e4m3fnuz",
            "float8_e5m2fnuz",
            "float8_e8m0fnu",
        ],
        2,
    )
    for name_, node in opaque.items():
        assert type(node) is Opaque
        assert type(node.args[0]) is StorageRef
        assert node.args[6] == Global("torch", name_)
    assert type(read(pickle_of(tensor(storage(name("torch", "QInt8Storage")))))) is Opaque


def test_parameters() -> None:
    """Parameters, frozen and tagged ones, and a buffer with attributes."""
    first, frozen, tagged, buffer = read(PICKLES["parameters"])
    assert [(t.parameter, t.requires_grad) for t in (first, frozen, tagged, buffer)] == [
        (True, True),
        (True, False),
        (True, True),
        (False, False),
    ]
    assert first.attributes is frozen.attributes is None
    assert tagged.attributes == {"tag": "x"}
    assert buffer.attributes["_is_buffer"] is True


def test_kinds_never_averaged_stay_opaque() -> None:
    """Quantised, sparse and meta tensors are recipes that hold their storages."""
    root = read(PICKLES["opaque"])
    assert {key: node.callable.name for key, node in root.items()} == {
        "quantised": "_rebuild_qtensor",
        "sparse": "_rebuild_sparse_tensor",
        "meta": "_rebuild_meta_tensor_no_storage",
    }
    assert root["quantised"].args[0] == StorageRef("0", "qint8", 3, "cpu")


@pytest.mark.parametrize("case", ["numpy", "numpy 4"])
def test_objects_of_other_libraries(case: str) -> None:
    """Objects keep their arguments, state, items and pairs."""
    root = read(PICKLES[case])
    assert root["scalar"].callable == Global("numpy._core.multiarray", "scalar")
    assert root["scalar"].args[1] == struct.pack("<d", 3)
    assert root["array"].state[4] == struct.pack("<3h", 0, 1, 2)
    assert root["default"].pairs == [("a", [1])]
    assert root["counter"].args == ({"a": 2, "b": 1},)
    assert root["device"].args == ("cuda", 1)
    assert root["size"] == (2, 3)
    assert root["dtype"] == Global("torch", "float16")
    assert root["path"].callable == Global("pathlib", "PurePosixPath")


def test_a_namespace_and_a_whole_module() -> None:
    """What NEWOBJ and BUILD make keeps its state, and tensors in it are found."""
    args = read(PICKLES["namespace"])["args"]
    assert args.where == "newobj"
    assert args.state == {"lr": 0.1, "names": ["a", "b"]}
    module = read(PICKLES["module"])
    linear = module.state["_modules"]["0"]
    assert view(linear.state["_parameters"]["weight"])[3] == (1, 2)
    assert linear.state["_parameters"]["weight"].parameter


def test_names_are_listed_once_in_order() -> None:
    """Also those of objects that are thrown away."""
    raw = pickle_of(
        call("os", "system", text("ls")), b"0", name("a", "b"), b"0", name("os", "system")
    )
    assert load(raw, "a.pt", "data.pkl")[2] == [Global("os", "system"), Global("a", "b")]


def test_a_stream_of_pickles() -> None:
    """Each tells where it ends; what follows is the caller's business."""
    raw = PICKLES["stream"]
    found, at = [], 0
    for _ in range(5):
        root, at, _ = load(raw, "a.pt", "pickle", at)
        found.append(root)
    assert found[0] == 0x1950A86A20F9469CFC6C
    assert found[1] == 1001
    assert found[2]["little_endian"] is True
    storages = {t.storage.key: t.storage for t in found[3]["model"].values()}
    assert sorted(found[4]) == sorted(storages)
    assert raw[at : at + 8] == struct.pack("<q", storages[found[4][0]].numel)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_what_python_reads(protocol: int) -> None:
    """Random trees come back equal, type for type, and as shared as they were."""
    rng = random.Random(protocol)
    for _ in range(60):
        made = tree(rng)
        found = read(pickle.dumps(made, protocol))
        assert found == made
        assert repr(found) == repr(made)
        assert found[0] is found[1]
    recursive: list[Any] = []
    recursive.append((recursive, frozenset({1})))
    found = read(pickle.dumps(recursive, protocol))
    assert found[0][0] is found
    assert found[0][1] == frozenset({1})


def test_an_ordered_dict_keeps_order_and_attributes() -> None:
    """As the `_metadata` of a module's state."""
    made: Any = OrderedDict((str(n) + "!", n) for n in range(2500))
    made.hint = [1]
    found = read(pickle.dumps(made, 2))
    assert list(found.items()) == list(made.items())
    assert found.attributes == {"hint": [1]}


# ---------------------------------------------------------------------------- what others wrote


# By cPickle of Python 2.7, protocol 2.
PYTHON_2 = base64.b64decode(
    "gAJ9cQEoVQJmc3ECY19fYnVpbHRpbl9fCmZyb3plbnNldApxA11xBEsBYYVScQVVAmJhcQZjX19idWlsdGluX18KYn"
    "l0ZWFycmF5CnEHWAIAAADDv1UHbGF0aW4tMYZScQhVAmRkcQljY29sbGVjdGlvbnMKZGVmYXVsdGRpY3QKcQpjX19i"
    "dWlsdGluX18KbGlzdApxC4VScQxLAV1xDUsCYXNYAwAAAGLDqXEOWAEAAAB4VQNyYXdxD1UC/wBxEFUCY3hxEWNfX2"
    "J1aWx0aW5fXwpjb21wbGV4CnESRwAAAAAAAAAARz/wAAAAAAAAhlJxE1UBYUsBVQFjY2NvbGxlY3Rpb25zCkNvdW50"
    "ZXIKcRR9cRUoVQFhSwJVAWJLAXWFUnEWVQFiiFUCb2RxF2Njb2xsZWN0aW9ucwpPcmRlcmVkRGljdApxGF1xGShdcR"
    "ooVQF6SwFlXXEbKFUBeUdABAAAAAAAAGVlhVJxHFUBbIoNAAAAQOrtdEbQnCyfDFUBbk5VAXNjX19idWlsdGluX18K"
    "c2V0CnEdXXEeSwFhhVJxH1UBdChLAUsCSwNLBHRxIFUCbnNxIWNhcmdwYXJzZQpOYW1lc3BhY2UKcSIpgXEjfXEkVQ"
    "JscnElRz+5mZmZmZmac2J1Lg=="
)


def test_a_pickle_of_python_2() -> None:
    """Text and bytes, ordered dicts and sets, objects; strings that are not UTF-8 are bytes."""
    root = read(PYTHON_2)
    objects = {key: root.pop(key) for key in ("ns", "dd", "c")}
    assert root == {
        "a": 1,
        "bé": "x",
        "raw": "ÿ\x00",
        "od": {"z": 1, "y": 2.5},
        "l": 10**30,
        "t": (1, 2, 3, 4),
        "s": {1},
        "ba": bytearray(b"\xff"),
        "n": None,
        "b": True,
        "fs": frozenset({1}),
        "cx": 1j,
    }
    assert type(root["od"]) is Ordered
    assert objects["ns"].state == {"lr": 0.1}
    assert objects["dd"].pairs == [(1, [2])]
    assert objects["c"].args == ({"a": 2, "b": 1},)


def test_forms_of_python_2() -> None:
    """Its strings, its ordered dicts made of lists, its name of the builtins."""
    pairs = list_of(
        list_of(b"U\x01a", b"K\x01"), list_of(b"U\x02\xc3\xa9", b"T\x01\x00\x00\x00\xff")
    )
    root = read(pickle_of(call("collections", "OrderedDict", pairs)))
    assert root == {"a": 1, "é": "ÿ"}
    assert read(pickle_of(call("__builtin__", "set", list_of(b"K\x01")))) == {1}
    array = call("__builtin__", "bytearray", text("\xff"), text("latin-1"))
    assert read(pickle_of(array)) == bytearray(b"\xff")


def test_the_first_way_to_make_a_tensor() -> None:
    """Four arguments, no gradient."""
    raw = call("torch._utils", "_rebuild_tensor", storage(), number(1), numbers(2), numbers(2))
    assert view(read(pickle_of(raw))) == ("0", F32, 1, (2,), (2,))


def test_a_parameter_from_before_0_4() -> None:
    """Made empty, then given (data, _, hooks, requires_grad, _)."""
    value = tuple_of(tensor(), b"N", HOOKS, b"\x88", b"\x89")
    made = name("torch.nn.parameter", "Parameter") + b")\x81q\x00" + value + b"b"
    root = read(pickle_of(b"]", made, b"ah\x00a"))
    assert root[0] is root[1]
    assert view(root[0]) == ("0", F32, 0, (2, 3), (3, 1))
    assert root[0].parameter
    assert root[0].requires_grad
    direct = name("torch.nn.parameter", "Parameter") + tuple_of(tensor(), b"\x89") + b"\x81"
    assert not read(pickle_of(direct)).requires_grad


def test_persistent_ids_of_streams() -> None:
    """A storage may be part of another; a module class stands beside its source text."""
    part = tuple_of(
        text("storage"),
        FLOATS,
        text("9"),
        text("cuda:0"),
        number(8),
        tuple_of(text("5"), number(2), number(6)),
    )
    assert read(pickle_of(part, b"Q")) == StorageRef("9", F32, 8, "cuda:0", ("5", 2, 6))
    module = tuple_of(text("module"), name("net", "Net"), text("net.py"), text("class Net"))
    assert read(pickle_of(module, b"Q")) == Global("net", "Net")


def test_attributes_of_a_tensor() -> None:
    """Other metadata than conj and neg, and other classes than Tensor, are not understood."""
    known = tensor(
        storage(), number(0), numbers(2), numbers(1), b"\x89", HOOKS, dict_of(text("neg"), b"\x88")
    )
    assert read(pickle_of(known)).neg
    other = tensor(
        storage(),
        number(0),
        numbers(2),
        numbers(1),
        b"\x89",
        HOOKS,
        dict_of(text("quasi"), b"\x88"),
    )
    assert type(read(pickle_of(other))) is Opaque
    args = tuple_of(storage(), number(0), numbers(2), numbers(1), b"\x89", HOOKS)
    for kind, expected in (("torch", TensorRef), ("my.code", Opaque)):
        typed = call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            name("torch._utils", "_rebuild_tensor_v2"),
            name(kind, "Tensor"),
            args,
            dict_of(),
        )
        assert type(read(pickle_of(typed))) is expected


def test_zero_strides_take_no_memory() -> None:
    """A view may have more elements than its storage: it is a record, not an array."""
    shape, strides = numbers(1 << 40, 1 << 20), numbers(0, 0)
    assert read(pickle_of(tensor(shape=shape, strides=strides))).shape == (1 << 40, 1 << 20)


def test_many_keys_that_count_are_no_attack() -> None:
    """The state of an optimizer has integers as keys; so has a vocabulary, of some 100,000."""
    made = dict.fromkeys(range(100_000))
    assert read(pickle.dumps(made, 2)) == made
    odd = {(n, str(n)): n for n in range(80)} | {1.5: 0, None: 1, b"x": 2, (): 3}
    assert read(pickle.dumps(odd, 2)) == odd


def test_a_pickle_of_20000_tensors() -> None:
    """In a second, several times what it takes."""
    made = {
        f"layer.{n}.weight": TensorRef(StorageRef(f"{n}", F32, 4, "cpu"), F32, 0, (4,), (1,))
        for n in range(20_000)
    }
    raw = encode(made)
    started = time.monotonic()
    root = read(raw)
    assert time.monotonic() - started < 1.5
    assert list(root) == list(made)

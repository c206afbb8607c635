"""Write a tree of plain data and tensors as the pickle torch.save would write of it.

Protocol 2, and only what ``torch.load(weights_only=True)`` accepts. Objects are numbered in the
order in which the pickler of Python numbers them, and batched like there (``Modules/_pickle.c``),
so what was read from a pickle of torch.save is written with the same bytes. Exceptions: the order
in a set, empty bytes (which torch.save writes in a way its own loader refuses), ``torch.Size``
(which is a tuple by then), and strings of one letter, of which Python keeps only one copy each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from ema_cli.errors import UnsupportedInput
from ema_cli.formats.torch.nodes import (
    DEPTH_LIMIT,
    Global,
    Opaque,
    Ordered,
    StorageRef,
    TensorRef,
)
from ema_cli.formats.torch.plain import INTEGER_LIMIT, integer_length, plain
from ema_cli.formats.torch.policy import judge
from ema_cli.formats.torch.rebuild import STORAGES, TENSOR, UNTYPED
from ema_cli.text import shorten

__all__ = ["encode", "plain"]

# As many entries as the pickler puts between a mark and one SETITEMS or APPENDS.
_BATCH = 1000

_CLASSES = {dtype: Global("torch", name) for name, dtype in STORAGES.items()} | {"": UNTYPED}
_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_ORDERED = Global("collections", "OrderedDict")
_ENCODE = Global("_codecs", "encode")
# Protocol 2 calls the module of the builtins as Python 2 did.
_SET = Global("__builtin__", "set")
_BYTEARRAY = Global("__builtin__", "bytearray")
_COMPLEX = Global("__builtin__", "complex")
# One object each, so that it is written once.
_STORAGE = "storage"
_LATIN_1 = "latin1"


def encode(root: Any) -> bytes:
    """Return the pickle of `root`.

    Raises `UnsupportedInput` for what ``weights_only=True`` would not load: objects of other
    classes, frozen sets, integers of more than 255 bytes, and what holds itself.
    """
    writer = _Writer()
    writer.save(root)
    verdict = judge(writer.names)
    for name in (*verdict.unknown, *verdict.inert):
        raise _cannot(f"an object of {shorten(name.full)}")
    return b"".join([b"\x80\x02", *writer.out, b"."])


def _cannot(what: str) -> UnsupportedInput:
    """Return the error for something that the loader would refuse."""
    return UnsupportedInput(
        f"cannot write {what} in a way that torch.load(weights_only=True) accepts",
        "leave it out of the output",
    )


def _integer(value: int) -> bytes:
    """Return the opcode for an integer."""
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    length = integer_length(value)
    if length > INTEGER_LIMIT:
        raise _cannot(f"an integer of {length} bytes")
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


class _Writer:
    """The pieces of a pickle, and the number of everything written that may come again.

    Attributes:
        names: the numbers of names; also says which were written.
        keys: the numbers of the keys of storages.
        memo: the numbers of all other objects, by identity, and the objects, so that none goes.
        open: the containers that are being written.
    """

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.names: dict[Global, int] = {}
        self.keys: dict[str, int] = {}
        self.memo: dict[int, tuple[int, object]] = {}
        self.open: set[int] = set()
        self._numbered = 0
        self._constants: dict[type, Callable[[Any], None]] = {
            type(None): lambda _: self.emit(b"N"),
            bool: lambda value: self.emit(b"\x88" if value else b"\x89"),
            int: lambda value: self.emit(_integer(value)),
            float: lambda value: self.emit(b"G" + struct.pack(">d", value)),
            Global: self._name,
            StorageRef: self._storage,
        }
        self._objects: dict[type, Callable[[Any], None]] = {
            str: self._string,
            bytes: self._bytes,
            bytearray: self._bytearray,
            complex: self._complex,
            list: self._list,
            tuple: self._tuple,
            dict: self._dict,
            Ordered: self._ordered,
            set: self._set,
            TensorRef: self._tensor,
            Opaque: self._opaque,
        }

    def emit(self, *pieces: bytes) -> None:
        """Append to the pickle."""
        self.out += pieces

    def save(self, node: Any) -> None:
        """Write any node, or the number of one that was written before."""
        kind = type(node)
        constant = self._constants.get(kind)
        if constant is not None:
            constant(node)
            return
        if id(node) in self.open:
            raise _cannot("what holds itself")
        known = self.memo.get(id(node))
        if known is not None:
            self._get(known[0])
            return
        handler = self._objects.get(kind)
        if handler is None:
            raise _cannot(f"a {kind.__name__}")
        if len(self.open) >= DEPTH_LIMIT:
            raise _cannot(f"what nests deeper than {DEPTH_LIMIT} levels")
        self.open.add(id(node))
        handler(node)
        self.open.remove(id(node))

    # ------------------------------------------------------------------------ numbers

    def _put(self, node: object = None) -> int:
        """Number what was just written, for later where it is `node`."""
        number = self._numbered
        self._numbered += 1
        if node is not None:
            self.memo[id(node)] = number, node
        small = number < 256
        self.emit(b"q" + bytes([number]) if small else b"r" + number.to_bytes(4, "little"))
        return number

    def _get(self, number: int) -> None:
        small = number < 256
        self.emit(b"h" + bytes([number]) if small else b"j" + number.to_bytes(4, "little"))

    def _name(self, name: Global) -> None:
        number = self.names.get(name)
        if number is not None:
            self._get(number)
            return
        if "\n" in name.module + name.name:
            raise _cannot(f"the name {shorten(name.full)}")
        text = f"c{name.module}\n{name.name}\n"
        self.emit(text.encode("utf-8", "surrogatepass"))
        self.names[name] = self._put()

    # ------------------------------------------------------------------------ leaves

    def _text(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        self.emit(b"X" + len(raw).to_bytes(4, "little"), raw)

    def _string(self, text: str) -> None:
        self._text(text)
        self._put(text)

    def _bytes(self, value: bytes) -> None:
        self._name(_ENCODE)
        self._text(value.decode("latin-1"))
        self._put()
        self.save(_LATIN_1)
        self.emit(b"\x86")
        self._put()
        self._reduced(value)

    def _bytearray(self, value: bytearray) -> None:
        self._name(_BYTEARRAY)
        if value:
            self._bytes(bytes(value))
            self.emit(b"\x85")
            self._put()
        else:
            self.emit(b")")
        self._reduced(value)

    def _complex(self, value: complex) -> None:
        self._name(_COMPLEX)
        self.save(value.real)
        self.save(value.imag)
        self.emit(b"\x86")
        self._put()
        self._reduced(value)

    def _reduced(self, node: object = None) -> None:
        self.emit(b"R")
        self._put(node)

    # ------------------------------------------------------------------------ containers

    def _tuple(self, items: tuple[Any, ...]) -> None:
        if not items:
            self.emit(b")")
            return
        if len(items) > 3:
            self.emit(b"(")
        for item in items:
            self.save(item)
        self.emit(b"t" if len(items) > 3 else (b"\x85", b"\x86", b"\x87")[len(items) - 1])
        self._put(items)

    def _list(self, items: list[Any]) -> None:
        self.emit(b"]")
        self._put(items)
        self._batches(items, b"a", b"e", alone=len(items) == 1)

    def _dict(self, pairs: dict[Any, Any]) -> None:
        self.emit(b"}")
        self._put(pairs)
        self._batches(pairs.items(), b"s", b"u", alone=len(pairs) == 1)
        if pairs and len(pairs) % _BATCH == 0:
            self.emit(b"(u")  # so does the pickler, which learns too late that nothing follows

    def _ordered(self, pairs: Ordered) -> None:
        self._name(_ORDERED)
        self.emit(b")")
        self._reduced(pairs)
        self._batches(pairs.items(), b"s", b"u")
        if pairs.attributes:
            self.save(pairs.attributes)
            self.emit(b"b")

    def _set(self, items: set[Any]) -> None:
        self._name(_SET)
        self._list(list(items))
        self.emit(b"\x85")
        self._put()
        self._reduced(items)

    def _batches(
        self, entries: Iterable[Any], one: bytes, many: bytes, *, alone: bool = True
    ) -> None:
        """Write items, or pairs of key and value; a last single one as such where `alone`."""
        paired = one == b"s"
        waiting = list(entries)
        for start in range(0, len(waiting), _BATCH):
            batch = waiting[start : start + _BATCH]
            single = alone and len(batch) == 1
            if not single:
                self.emit(b"(")
            for entry in batch:
                if paired:
                    self.save(entry[0])
                    self.save(entry[1])
                else:
                    self.save(entry)
            self.emit(one if single else many)

    def _opaque(self, node: Opaque) -> None:
        if node.where not in ("reduce", "newobj"):
            raise _cannot("an object made with keyword arguments")
        self.save(node.callable)
        self.save(node.args)
        self.emit(b"R" if node.where == "reduce" else b"\x81")
        self._put(node)
        self._batches(node.items, b"a", b"e")
        self._batches(node.pairs, b"s", b"u")
        if node.state is not None:
            self.save(node.state)
            self.emit(b"b")

    # ------------------------------------------------------------------------ tensors

    def _storage(self, storage: StorageRef) -> None:
        if storage.view is not None:
            raise _cannot("a view of a storage")
        self.emit(b"(")
        self.save(_STORAGE)
        self._name(_CLASSES[storage.dtype])
        number = self.keys.get(storage.key)
        if number is None:
            self._text(storage.key)
            self.keys[storage.key] = self._put()
        else:
            self._get(number)
        self.save(storage.location)
        self.emit(_integer(storage.numel), b"t")
        self._put()
        self.emit(b"Q")

    def _tensor(self, tensor: TensorRef) -> None:
        if tensor.parameter:
            self._parameter(tensor)
        elif tensor.attributes is not None:
            self._attributed(tensor)
        else:
            self._name(_V2 if tensor.storage.dtype else _V3)
            self._view(tensor)
            self._reduced(tensor)

    def _parameter(self, tensor: TensorRef) -> None:
        self._name(_PARAMETER if tensor.attributes is None else _WITH_STATE)
        if tensor.attributes is not None:
            self.emit(b"(")
        self._name(_V2 if tensor.storage.dtype else _V3)
        # What a parameter is made of was detached from it, and needs no gradient.
        self._view(tensor, requires_grad=False)
        self._reduced()
        self.save(tensor.requires_grad)
        self._ordered(Ordered())
        if tensor.attributes is None:
            self.emit(b"\x87")
        else:
            self.save(tensor.attributes)
            self.emit(b"t")
        self._put()
        self._reduced(tensor)

    def _attributed(self, tensor: TensorRef) -> None:
        self._name(_FROM_TYPE)
        self.emit(b"(")
        self._name(_V2 if tensor.storage.dtype else _V3)
        self._name(TENSOR)
        self._view(tensor)
        self.save(tensor.attributes)
        self.emit(b"t")
        self._put()
        self._reduced(tensor)

    def _view(self, tensor: TensorRef, requires_grad: bool | None = None) -> None:
        """Write the arguments a tensor is made of."""
        self.emit(b"(")
        self._storage(tensor.storage)
        self.emit(_integer(tensor.offset))
        self.save(tensor.shape)
        self.save(tensor.strides)
        self.save(tensor.requires_grad if requires_grad is None else requires_grad)
        self._ordered(Ordered())
        if not tensor.storage.dtype:
            self._name(Global("torch", tensor.dtype))
        elif tensor.storage.dtype != tensor.dtype:
            raise _cannot(f"{tensor.dtype} in a storage of {tensor.storage.dtype}")
        flags = {"conj": tensor.conj, "neg": tensor.neg}
        if any(flags.values()):
            self.save({name: True for name, value in flags.items() if value})
        self.emit(b"t")
        self._put()

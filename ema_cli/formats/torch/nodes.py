"""What a pickle of PyTorch says, as inert records: nothing here is ever imported or called.

Plain data is plain Python: dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float,
complex, bool, None. ``torch.Size`` is a tuple. What is more than data is one of the classes below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# How deep lists, dicts and objects may nest in what is read and written, so that walks may recurse.
DEPTH_LIMIT = 200

# Bytes of one element, by our name; names that `ema_cli.tensors` does not know are never averaged.
ITEM_SIZES = {
    "": 1,
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
}


class Global(NamedTuple):
    """A name that a pickle mentions: ``module.name``. It is not looked up anywhere."""

    module: str
    name: str

    @property
    def full(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


class StorageRef(NamedTuple):
    """A run of elements kept outside the pickle.

    Attributes:
        key: what tells it from the other storages of the file.
        dtype: our name of its element type, or empty for bytes of any type.
        numel: number of elements, or of bytes where there is no dtype.
        location: the device it was saved from, e.g. ``"cuda:0"``.
        view: (key, offset, numel) in stream files that keep a part of another storage, else None.
    """

    key: str
    dtype: str
    numel: int
    location: str
    view: tuple[str, int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.numel * ITEM_SIZES[self.dtype]


class TensorRef:
    """A tensor: a view of a storage. Compared by identity, as two may look alike.

    Attributes:
        storage: where its elements are.
        dtype: our name of its element type.
        offset: of its first element, in elements of `dtype`.
        shape: its dimensions.
        strides: one per dimension, in elements, as pickled.
        requires_grad: whether it was trained.
        conj: whether its values are the complex conjugates of what is stored.
        neg: whether its values are the negatives of what is stored.
        parameter: whether it was a parameter of a module rather than a plain tensor.
        attributes: what else hung on it, or None.
    """

    __slots__ = (
        "attributes",
        "conj",
        "dtype",
        "neg",
        "offset",
        "parameter",
        "requires_grad",
        "shape",
        "storage",
        "strides",
    )

    def __init__(
        self,
        storage: StorageRef,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        requires_grad: bool = False,
        conj: bool = False,
        neg: bool = False,
        parameter: bool = False,
        attributes: object = None,
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.requires_grad = requires_grad
        self.conj = conj
        self.neg = neg
        self.parameter = parameter
        self.attributes = attributes

    def but(self, **changes: Any) -> TensorRef:
        """Return a copy with some attributes changed."""
        made = TensorRef(self.storage, self.dtype, self.offset, self.shape, self.strides)
        made.requires_grad, made.parameter = self.requires_grad, self.parameter
        made.conj, made.neg, made.attributes = self.conj, self.neg, self.attributes
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def __repr__(self) -> str:
        return f"TensorRef({self.storage.key!r}, {self.dtype}, {self.offset}, {self.shape})"


class Opaque:
    """An object of which only the recipe is known: which callable, which arguments.

    Quantised, sparse, nested and meta tensors, tensors of unknown element types and tensor
    subclasses are such objects too; their storages stand among the arguments.

    Attributes:
        callable: a `Global`, or whatever else the pickle wanted called.
        args: its arguments; for ``"newobj_ex"`` a pair of arguments and keyword arguments.
        state: what was to be set on the result, or None.
        items: what was to be appended (or added) to it.
        pairs: (key, value) of what was to be set in it, as in a mapping.
        where: how the pickle makes it: ``"reduce"``, ``"newobj"`` or ``"newobj_ex"``.
    """

    __slots__ = ("args", "callable", "items", "pairs", "state", "where")

    def __init__(self, callable_: object, args: tuple[Any, ...], where: str = "reduce") -> None:
        self.callable = callable_
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []
        self.where = where

    def __repr__(self) -> str:
        name = self.callable.full if type(self.callable) is Global else "?"
        return f"Opaque({name})"


class Ordered(dict[Any, Any]):
    """A ``collections.OrderedDict``, which may carry attributes.

    Attributes:
        attributes: by name; a module's state has ``_metadata``, which names its versions.
    """

    __slots__ = ("attributes",)

    def __init__(self, pairs: Any = (), attributes: dict[Any, Any] | None = None) -> None:
        super().__init__(pairs)
        self.attributes: dict[Any, Any] = {} if attributes is None else attributes

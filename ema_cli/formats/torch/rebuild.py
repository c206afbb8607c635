"""What a call in a pickle stands for, where it is one that PyTorch writes for tensors.

Each function here takes the arguments of one such call, checks every one of them, and returns the
record. Calls of other names stay `Opaque`, and so do known ones that make a tensor of a kind that
is never averaged: quantised, sparse, nested, meta, of a subclass or of an unknown element type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ema_cli.formats.torch.nodes import (
    ITEM_SIZES,
    Global,
    Opaque,
    Ordered,
    StorageRef,
    TensorRef,
)
from ema_cli.formats.torch.state import COUNT_LIMIT, Builder, State
from ema_cli.text import shorten

RANK_LIMIT = 64

# Storage classes and what they hold; those of other devices are named alike.
STORAGES: Mapping[str, str] = {
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
UNTYPED = Global("torch.storage", "UntypedStorage")
TENSOR = Global("torch", "Tensor")
PARAMETER = Global("torch.nn.parameter", "Parameter")


# ---------------------------------------------------------------------------- storages


def storage(state: State, pid: Any) -> Any:
    """Return the storage (or the module class) that a persistent id is for."""
    if type(pid) is not tuple or len(pid) < 4:
        state.fail("expected the persistent id of a storage")
    if pid[0] == "module" and len(pid) == 4 and type(pid[1]) is Global:
        return pid[1]  # stream files keep the source text of module classes beside them
    if pid[0] != "storage" or len(pid) not in (5, 6):
        state.fail("expected the persistent id of a storage")
    _, kind, key, location, numel = pid[:5]
    dtype = _storage_dtype(state, kind)
    if type(key) is not str or not key or len(key) > 100 or "/" in key or "\0" in key:
        state.fail("expected a storage with a key of 1 to 100 characters and no slash")
    if type(location) is not str:
        state.fail("expected the location of a storage, found something else")
    view = pid[5] if len(pid) == 6 else None
    if view is not None and not _is_view(view):
        state.fail("expected a view of a storage, found something else")
    found = StorageRef(key, dtype, state.count(numel, "elements"), location, view)
    known = state.storages.setdefault(key, found)
    if known[:3] != found[:3]:
        state.fail(
            f"storage '{shorten(key)}': expected {known.numel} of {known.dtype or 'bytes'} "
            f"as before, found {found.numel} of {found.dtype or 'bytes'}"
        )
    return found


def _storage_dtype(state: State, kind: Any) -> str:
    if kind == UNTYPED:
        return ""
    dtype = None
    if type(kind) is Global and kind.module in ("torch", "torch.cuda"):
        dtype = STORAGES.get(kind.name)
    if dtype is None:
        named = kind.full if type(kind) is Global else type(kind).__name__
        state.fail(f"expected the class of a storage, found {shorten(named)}")
    return dtype


def _is_view(view: Any) -> bool:
    if type(view) is not tuple or len(view) != 3 or type(view[0]) is not str:
        return False
    return all(type(n) is int and 0 <= n < COUNT_LIMIT for n in view[1:])


# ---------------------------------------------------------------------------- tensors


def _tensor_v1(state: State, args: tuple[Any, ...]) -> Any:
    _check_length(state, args, 4, 4)
    return _tensor(state, args, None, False, None)


def _tensor_v2(state: State, args: tuple[Any, ...]) -> Any:
    _check_length(state, args, 6, 7)
    _check_hooks(state, args[5])
    return _tensor(state, args, None, args[4], args[6] if len(args) == 7 else None)


def _tensor_v3(state: State, args: tuple[Any, ...]) -> Any:
    _check_length(state, args, 7, 8)
    _check_hooks(state, args[5])
    dtype = args[6]
    if type(dtype) is not Global or dtype.module != "torch":
        state.fail("expected an element type of torch, found something else")
    return _tensor(state, args, dtype.name, args[4], args[7] if len(args) == 8 else None)


def _tensor(
    state: State,
    args: tuple[Any, ...],
    dtype: str | None,
    requires_grad: Any,
    metadata: Any,
) -> Any:
    """Return a tensor with every element inside its storage, or None for an unknown kind."""
    held, offset, shape, strides = args[:4]
    if type(held) is not StorageRef:
        state.fail(f"expected the storage of a tensor, found a {type(held).__name__}")
    if dtype is None:
        if not held.dtype:
            state.fail("expected a storage with an element type, found bytes")
        dtype = held.dtype
    elif held.dtype not in ("", dtype):
        state.fail(f"expected a storage of {shorten(dtype)}, found {held.dtype}")
    if type(requires_grad) is not bool:
        state.fail("expected requires_grad to be True or False")
    _check_shape(state, offset, shape, strides)
    flags = _flags(state, metadata) if metadata else (False, False)
    if flags is None or dtype not in ITEM_SIZES or dtype[0] == "q":
        return None
    _check_inside(state, held, ITEM_SIZES[dtype], args)
    return TensorRef(held, dtype, offset, shape, strides, requires_grad, *flags)


def _check_inside(state: State, held: StorageRef, item: int, args: tuple[Any, ...]) -> None:
    """Check that the last element, of `item` bytes, lies in the storage."""
    _, last, shape, strides = args[:4]
    for length, stride in zip(shape, strides, strict=True):
        if not length:
            return
        last += (length - 1) * stride
    if (last + 1) * item > held.nbytes:
        state.fail(
            f"a tensor of shape {shorten(str(list(shape)))} with strides "
            f"{shorten(str(list(strides)))} reaches to element {last:,}, "
            f"but its storage '{shorten(held.key)}' holds {held.nbytes // item:,}"
        )


def _check_shape(state: State, offset: Any, shape: Any, strides: Any) -> None:
    state.count(offset, "elements before the first")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        state.fail("expected a tuple of dimensions and one of as many strides")
    if len(shape) > RANK_LIMIT:
        state.fail(f"expected at most {RANK_LIMIT} dimensions, found {len(shape)}")
    for number in shape:
        state.count(number, "elements of a dimension")
    for number in strides:
        state.count(number, "elements of a stride")


def _flags(state: State, metadata: Any) -> tuple[bool, bool] | None:
    """Return whether the values are conjugated and negated, or None for other metadata."""
    if type(metadata) not in (dict, Ordered):
        state.fail(f"expected the metadata of a tensor, found a {type(metadata).__name__}")
    if not metadata.keys() <= {"conj", "neg"}:
        return None
    if not all(type(value) is bool for value in metadata.values()):
        state.fail("expected the metadata of a tensor to be True or False")
    return metadata.get("conj", False), metadata.get("neg", False)


def _check_length(state: State, args: tuple[Any, ...], least: int, most: int) -> None:
    if not least <= len(args) <= most:
        state.fail(f"expected {least} to {most} arguments to make a tensor, found {len(args)}")


def _check_hooks(state: State, hooks: Any) -> None:
    if hooks is not None and type(hooks) not in (Ordered, dict):
        state.fail(f"expected the hooks of a tensor, found a {type(hooks).__name__}")


# ---------------------------------------------------------------------------- parameters


def _parameter(state: State, args: tuple[Any, ...]) -> Any:
    _check_length(state, args, 3, 3)
    _check_hooks(state, args[2])
    return _as_parameter(state, args[0], args[1], None)


def _parameter_with_state(state: State, args: tuple[Any, ...]) -> Any:
    _check_length(state, args, 4, 4)
    _check_hooks(state, args[2])
    return _as_parameter(state, args[0], args[1], args[3])


def _as_parameter(state: State, data: Any, requires_grad: Any, attributes: Any) -> Any:
    if type(data) is Opaque:
        return None
    if type(data) is not TensorRef or type(requires_grad) is not bool:
        state.fail("expected a parameter to be made of a tensor and True or False")
    return data.but(requires_grad=requires_grad, parameter=True, attributes=attributes)


def _typed(state: State, args: tuple[Any, ...]) -> Any:
    """Return a tensor with attributes; one of a subclass of Tensor stays opaque."""
    _check_length(state, args, 4, 4)
    function, kind, inner, attributes = args
    if type(function) is not Global or type(kind) is not Global or type(inner) is not tuple:
        state.fail("expected a function, a class and arguments to make a tensor")
    if function.module != "torch._utils":
        state.fail(f"expected a function of torch._utils, found {shorten(function.full)}")
    builder = TENSOR_BUILDERS.get(function)
    if kind not in (TENSOR, PARAMETER) or builder is None:
        return None
    made = builder(state, inner)
    if type(made) is not TensorRef:
        return None
    return made.but(attributes=attributes, parameter=made.parameter or kind == PARAMETER)


def new_parameter(state: State, args: tuple[Any, ...]) -> Any:
    """Return a parameter as PyTorch before 0.4 made it: empty until its state is set."""
    _check_length(state, args, 0, 2)
    if args:
        return _as_parameter(state, args[0], args[1] if len(args) == 2 else True, None)
    nothing = StorageRef("", "float32", 0, "cpu")
    return TensorRef(nothing, "float32", 0, (0,), (1,), True, parameter=True)


def set_parameter(state: State, target: TensorRef, value: Any) -> None:
    """Give an empty parameter its tensor: (data, _, hooks, requires_grad, _)."""
    if type(value) is not tuple or len(value) != 5 or target.storage.key:
        state.fail("expected no state, or that of an empty parameter, found another for a tensor")
    made = _as_parameter(state, value[0], value[3], None)
    if made is None:
        state.fail("expected a parameter to be made of a tensor")
    for name in TensorRef.__slots__:
        setattr(target, name, getattr(made, name))


TENSOR_BUILDERS: Mapping[Global, Builder] = {
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Global("torch._utils", "_rebuild_tensor"): _tensor_v1,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
    Global("torch._tensor", "_rebuild_from_type_v2"): _typed,
}

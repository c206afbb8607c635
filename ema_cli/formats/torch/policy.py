"""Which names a pickle may mention and still be passed on, byte for byte, in an output.

Reading needs no such list, since nothing is called. But an output that repeats a pickle repeats
its calls, in whatever loads it. Three classes: (a) what ``torch.load(weights_only=True)`` accepts;
(b) data classes that do no harm whatever arguments and state they are given; (c) all others.

(b) is a list of exact pairs, never a prefix: a module also holds all that it imports, and most
packages hold some function that runs what it is given. For the same reason no name with a dot in
it is listed, and none that calls, imports, looks up or makes classes: ``getattr``, ``type``,
``functools.partial``, ``operator``, ``copyreg`` are (c). A factory or a class among the arguments
is itself a name of the pickle, so it is judged as well. Classes that only exist in memory may use
up memory; so may any file. NumPy's dtype trusts the state it is given with the layout of memory,
so the state is judged too. List (a): ``torch/_weights_only_unpickler.py`` of PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ema_cli.formats.torch.nodes import Global, Opaque

_SIMPLE = "Byte Char Double Float Half Int Long Short BFloat16"

# Module -> names, in class (a).
_TORCH: dict[str, str] = {
    "_codecs": "encode",
    "builtins": "bytearray complex set",
    "collections": "Counter OrderedDict",
    "torch": (
        "Size Tensor device bfloat16 bits16 bits1x8 bits2x4 bits4x2 bits8 bool complex128 "
        "complex32 complex64 float16 float32 float4_e2m1fn_x2 float64 float8_e4m3fn "
        "float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int1 int16 int2 int3 int32 "
        "int4 int5 int6 int64 int7 int8 per_channel_affine per_channel_affine_float_qparams "
        "per_channel_symmetric per_tensor_affine per_tensor_symmetric qint32 qint8 quint2x4 "
        "quint4x2 quint8 uint1 uint16 uint2 uint3 uint32 uint4 uint5 uint6 uint64 uint7 uint8 "
        "QInt32Storage QInt8Storage QUInt2x4Storage QUInt4x2Storage QUInt8Storage"
    ),
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": (
        "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
        "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter "
        "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor "
        "_rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_wrapper_subclass"
    ),
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch.storage": "TypedStorage UntypedStorage",
}

# Module -> names, in class (b).
_INERT: dict[str, str] = {
    "argparse": "Namespace",
    "builtins": "bool bytes dict float frozenset int list object range slice str tuple",
    "collections": "defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "types": "SimpleNamespace",
    "typing": "Any",
    "uuid": "UUID",
    "numpy": (
        "bool_ complex128 complex64 dtype float16 float32 float64 int16 int32 int64 int8 ndarray "
        "uint16 uint32 uint64 uint8"
    ),
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": (
        "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode"
    ),
    "easydict": "EasyDict",
    "munch": "Munch",
    "yacs.config": "CfgNode",
    "lightning.fabric.utilities.data": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "accelerate.utils.dataclasses": "DistributedType DynamoBackend PrecisionType",
    "transformers.trainer_utils": (
        "EvaluationStrategy FSDPOption HubStrategy IntervalStrategy SaveStrategy SchedulerType"
    ),
    "transformers.training_args": "OptimizerNames ParallelMode",
    "torch._tensor": "_rebuild_from_type",
}


class Verdict(NamedTuple):
    """What a pickle mentions beyond what ``weights_only=True`` accepts.

    Attributes:
        inert: data classes: the file loads with ``weights_only=False`` only, and does no harm.
        unknown: everything else: nothing can be said of what loading would do.
    """

    inert: tuple[Global, ...]
    unknown: tuple[Global, ...]


def judge(names: Iterable[Global]) -> Verdict:
    """Return which of `names` are of class (b) and (c), each once, in their order."""
    inert: dict[Global, None] = {}
    unknown: dict[Global, None] = {}
    for name in names:
        spelled = _modern(name)
        if spelled not in _WEIGHTS_ONLY:
            (inert if spelled in _HARMLESS else unknown)[name] = None
    return Verdict(tuple(inert), tuple(unknown))


def odd_dtypes(dtypes: Sequence[Opaque]) -> list[Global]:
    """Return a name of class (c) if one of these NumPy dtypes is given an unusual state.

    A dtype takes sizes, fields and flags from its state as they are, and then reads memory by them.
    """
    odd = any(dtype.state is not None and not _usual(dtype) for dtype in dtypes)
    return [Global("numpy", "dtype (with a layout of its own)")] if odd else []


def _usual(dtype: Opaque) -> bool:
    """Whether the state is the one NumPy gives to the dtype of this name."""
    name = dtype.args[0] if dtype.args else None
    if type(name) is not str or type(dtype.state) is not tuple:
        return False
    kind, width = name[:1], name[1:]
    if not (width.isascii() and width.isdigit() and len(width) < 9):
        return False
    if kind in "biufc":
        sizes = (-1, -1, 0)
    elif kind == "O":
        sizes = (-1, -1, 63)
    elif kind in "SV":
        sizes = (int(width), 1, 0)
    elif kind == "U":
        sizes = (4 * int(width), 4, 8)
    else:
        return False
    return _same(dtype.state, sizes)


def _same(state: tuple[Any, ...], sizes: tuple[int, int, int]) -> bool:
    order = state[1] if len(state) == 8 else None
    if type(order) is not str or order not in ("<", ">", "|", "="):
        return False
    return (state[0], *state[2:]) == (3, None, None, None, *sizes)


# Of Python 2, as `_compat_pickle` of Python 3 translates them.
_RENAMED = {"long": "int", "unicode": "str", "xrange": "range"}


def _modern(name: Global) -> Global:
    """Return the name as Python 3 calls it."""
    if name.module != "__builtin__":
        return name
    return Global("builtins", _RENAMED.get(name.name, name.name))


def _pairs(table: dict[str, str]) -> set[Global]:
    return {Global(module, name) for module, names in table.items() for name in names.split()}


def _classes() -> set[Global]:
    """Return the tensor and storage classes of each device, as PyTorch before 0.4 used them."""
    found: set[Global] = set()
    for module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"):
        kinds = _SIMPLE.split()
        if not module.endswith("sparse"):
            kinds.append("Bool")
            found |= {Global(module, f"{kind}Storage") for kind in kinds}
            found |= {Global(module, f"Complex{kind}Storage") for kind in ("Double", "Float")}
        found |= {Global(module, f"{kind}Tensor") for kind in kinds}
    return found


_WEIGHTS_ONLY = frozenset(_pairs(_TORCH) | _classes())
_HARMLESS = frozenset(_pairs(_INERT))

"""Write ``torch_files.json``: small files that torch.save wrote, and what they hold.

Run it with PyTorch 2.13 on Python 3.11:  python make_torch_files.py
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import lzma
import pathlib
import warnings

import torch
from torch import nn

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
# What the stream format has no class of storages for.
NEWER = ("uint16", "uint32", "uint64", "float8")


class Network(nn.Module):
    """Tied and shared parts, a buffer that is not saved, an attribute, and a way back to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.register_parameter("nothing", None)
        self.attribute = torch.full((2,), 7.0)
        self.few = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.itself = [self]


class Thing:
    """An object of a class that nobody knows."""

    def __init__(self) -> None:
        self.inside = torch.ones(2)


def of_dtype(name: str) -> torch.Tensor:
    """Return 15 elements of arbitrary bytes, or of truth values."""
    dtype = getattr(torch, name)
    raw = torch.arange(15 * dtype.itemsize) % 64
    return (raw % 2 == 0 if name == "bool" else raw.to(torch.uint8).view(dtype)).reshape(3, 5)


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of all dtypes, and views of all kinds."""
    base = torch.arange(60.0).reshape(6, 10)
    return {
        **{name: of_dtype(name) for name in DTYPES},
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "base": base,
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "box": base[1:4, 2:7],
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "channels_last": torch.arange(24.0)
        .reshape(1, 2, 3, 4)
        .to(memory_format=torch.channels_last),
        "uniçode/naïve": torch.ones(2),
    }


def network() -> Network:
    torch.manual_seed(3)
    return Network()


def training() -> dict[str, object]:
    """Return what a training program saves, with objects of its own."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "thing": Thing(),
        "best": (torch.tensor(0.5), {"step": 7}),
        "num_updates": 12,
    }


def kinds() -> dict[str, object]:
    """Return one tensor that can be averaged, and those that cannot."""
    return {
        "w": torch.ones(3),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "complex32": torch.zeros(3, dtype=torch.complex32),
        "meta": torch.empty(3, device="meta"),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    }


def saved(thing: object, **options: object) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


def unchecked(thing: object) -> bytes:
    """Return what torch.save writes without checksums."""
    torch.serialization.set_crc32_options(False)
    try:
        return saved(thing)
    finally:
        torch.serialization.set_crc32_options(True)


def described(state: dict[str, torch.Tensor]) -> dict[str, list[object]]:
    """Return dtype, shape and the bytes in C order of each tensor."""
    return {
        name: [str(t.dtype)[6:], list(t.shape), base64.b64encode(raw(t)).decode("ascii")]
        for name, t in state.items()
    }


def raw(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def main() -> None:
    """Write the file beside this script."""
    warnings.simplefilter("ignore")
    every = tensors()
    classic = {name: t for name, t in every.items() if not name.startswith(NEWER)}
    state = network().state_dict()
    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    files: dict[str, tuple[bytes, dict[str, torch.Tensor]]] = {
        "tensors": (saved(collections.OrderedDict(every)), every),
        "stream": (saved(classic, _use_new_zipfile_serialization=False), classic),
        "stream of protocol 4": (
            saved(classic, _use_new_zipfile_serialization=False, pickle_protocol=4),
            classic,
        ),
        "state": (saved(state), state),
        "unchecked": (unchecked(state), state),
        "module": (saved(network()), state),
        "training": (saved(training()), training()["model"]),
        "kinds": (saved(kinds()), {"w": torch.ones(3)}),
        "negative": (saved({"w": torch.ones(3), "negative": imaginary}), {}),
    }
    document = {
        "torch": torch.__version__,
        "files": {
            name: {
                "file": base64.b85encode(lzma.compress(content)).decode("ascii"),
                "tensors": described(held),
            }
            for name, (content, held) in files.items()
        },
    }
    path = pathlib.Path(__file__).parent / "torch_files.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

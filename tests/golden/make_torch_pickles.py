"""Write ``torch_pickles.json``: what torch.save itself pickles, and which names it accepts.

Run it with PyTorch 2.13 and NumPy 2 on Python 3.11:  python make_torch_pickles.py
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import pathlib
import warnings
import zipfile

import numpy as np
import torch
from torch._weights_only_unpickler import _get_allowed_globals


class Tied(torch.nn.Module):
    """An embedding whose weight is the output layer's too, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.head = torch.nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight


def pickled(thing: object, protocol: int = 2) -> bytes:
    """Return the pickle inside what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def stream(thing: object) -> bytes:
    """Return the whole stream file that torch.save writes on request."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def checkpoint() -> dict[str, object]:
    """Return what a training loop saves."""
    torch.manual_seed(1)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 300,
        "loss": 0.25,
        "seed": 1 << 70,
        "done": None,
        "raw": b"\x00\xff",
        "tags": {1, 2},
        "shape": (1, 2, 3, 4),
    }


def views() -> dict[str, torch.Tensor]:
    """Return tensors whose bytes are not simply their values in order."""
    base = torch.arange(24.0)
    return {
        "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "slice": base[3:9],
        "transposed": base.reshape(4, 6).t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "neg": torch.ones(2, dtype=torch.complex64).conj().imag,
    }


def dtypes() -> dict[str, torch.Tensor]:
    """Return one tensor of each element type, known and unknown."""
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 "
        "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
        "float8_e8m0fnu complex32 float4_e2m1fn_x2"
    )
    return {name: torch.empty(2, dtype=getattr(torch, name)) for name in names.split()}


def parameters() -> list[torch.Tensor]:
    """Return parameters and buffers, with and without attributes."""
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.tag = "x"
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    return [torch.nn.Parameter(torch.ones(2)), frozen, tagged, torch.nn.Buffer(torch.ones(3))]


def numpy_values() -> dict[str, object]:
    """Return what NumPy and the standard library leave in checkpoints."""
    return {
        "scalar": np.float64(3),
        "array": np.arange(3, dtype=np.int16),
        "text": np.array(["a", "bcd"]),
        "path": pathlib.PurePosixPath("a/b"),
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
    }


def main() -> None:
    """Write the file."""
    warnings.simplefilter("ignore")
    args = argparse.Namespace(lr=0.1, names=["a", "b"])
    pickles = {
        "checkpoint": pickled(checkpoint()),
        "checkpoint 4": pickled(checkpoint(), 4),
        "checkpoint 5": pickled(checkpoint(), 5),
        "views": pickled(views()),
        "dtypes": pickled(dtypes()),
        "parameters": pickled(parameters()),
        "opaque": pickled(
            {
                "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
                "sparse": torch.eye(2).to_sparse(),
                "meta": torch.empty(2, device="meta"),
            }
        ),
        "namespace": pickled({"args": args, "model": {"w": torch.ones(2)}}),
        "numpy": pickled(numpy_values()),
        "numpy 4": pickled(numpy_values(), 4),
        "module": pickled(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))),
        "stream": stream({"model": Tied().state_dict(), "step": 300}),
    }
    golden = {
        "torch": torch.__version__,
        "accepted": sorted(_get_allowed_globals()),
        "pickles": {name: base64.b64encode(raw).decode() for name, raw in pickles.items()},
    }
    target = pathlib.Path(__file__).with_name("torch_pickles.json")
    target.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

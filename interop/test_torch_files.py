"""PyTorch loads what we wrote of its checkpoints and finds the averages it computed itself."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import Array, differences, theirs
from torch.nn.functional import cross_entropy
from torch.serialization import safe_globals
from torch_support import TORCH, State, arrays, load, plain, tensors

from ema_cli import average_run, rename

# isort: split
from networks import Classifier, Reader, discriminator, generator

MODELS = {"run": Reader, "legacy": Reader, "lightning": Classifier, "hf": Classifier}
# Where the model is in a checkpoint, and the last checkpoint of the run.
INSIDE = {
    "run": ("model", "run/ckpt-40.pt"),
    "lightning": ("state_dict", "lightning/epoch=2-step=60.ckpt"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tensorflow": {"decay": 0.9, "shadow_dtype": "same"},
    "ema": {"decay": 0.9, "like": "torch"},
    "ema-buffers": {"decay": 0.9, "like": "torch", "statistics": "average"},
    "mean": {"average": ["mean"], "like": "torch"},
    "mean-buffers": {"average": ["mean"], "like": "torch", "statistics": "average"},
}


@pytest.fixture(autouse=True)
def strictly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch checks that storages lie where it would compute them; the fixtures may be loaded."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with safe_globals([argparse.Namespace]):
        yield


def expected(run: str, name: str) -> dict[str, Array]:
    """Return the average that the framework computed of a run."""
    folder = {"legacy": "run"}.get(run, run)
    return load_file(TORCH / "expected" / folder / f"{name}.safetensors")


def check(state: State, run: str, name: str) -> None:
    """The state_dict goes into the model, and holds the expected average, the counters the last."""
    model = MODELS[run]()
    model.load_state_dict(state, strict=True)
    assert differences(arrays(model.state_dict()), arrays(state)) == []
    found, average = arrays(state), expected(run, name)
    counters = [key for key, array in found.items() if array.dtype.kind == "i"]
    for key in counters:
        last = int(
            max(path.name.split("-")[-1].split("=")[-1].split(".")[0] for path in files(run))
        )
        assert found.pop(key) == last
        average.pop(key, None)
    assert len(counters) == 1
    assert differences(found, average) == []


def files(run: str) -> list[Path]:
    """Return the checkpoints of a run; the last part of their names is the step."""
    return list((TORCH / run).iterdir())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("run", ["run", "lightning", "legacy"])
def test_the_average_is_the_frameworks(run: str, name: str, tmp_path: Path) -> None:
    """As a copy of the last checkpoint, or where that is a stream, as a file of its own."""
    out = tmp_path / "average.pt"
    average_run(TORCH / run, out, **OPTIONS[name])
    loaded = load(out)
    state = loaded[INSIDE[run][0]] if run in INSIDE else loaded
    assert isinstance(state, OrderedDict)
    assert state._metadata == MODELS[run]().state_dict()._metadata
    check(state, run, name)
    if run not in INSIDE:
        assert len(loaded) == len(state)
        return
    key, last = INSIDE[run]
    before = torch.load(TORCH / last, weights_only=False)
    assert plain(loaded) == plain(before)
    changed = differences(arrays(tensors(loaded)), arrays(tensors(before)))
    assert all(path.startswith(f"/{key}/") for path in changed)


def test_a_training_goes_on_from_an_average(tmp_path: Path) -> None:
    """Tied tensors are tied, channels_last is kept, and the optimizer takes its state."""
    out = tmp_path / "average.pt"
    average_run(TORCH / "run", out, **OPTIONS["ema"])
    loaded = load(out)
    state = loaded["model"]
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert state["conv2.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not state["conv2.weight"].is_contiguous()
    assert state["scale"].dtype == torch.bfloat16
    assert (loaded["step"], loaded["args"].arch) == (40, "reader")
    model = Reader()
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    cross_entropy(model(torch.rand(4, 64), torch.arange(4)), torch.arange(4)).backward()
    optimizer.step()
    assert model.head.weight is model.embedding.weight
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16"])
@pytest.mark.parametrize("run", ["run", "lightning", "legacy"])
def test_a_plain_state_dict_of_the_average(run: str, dtype: str | None, tmp_path: Path) -> None:
    """`--optimizer drop` and `--dtype` leave a file that needs nothing but PyTorch."""
    out = tmp_path / "average.pth"
    average_run(TORCH / run, out, optimizer="drop", dtype=dtype, **OPTIONS["tensorflow"])
    with safe_globals([]):
        state = load(out)
    model = MODELS[run]()
    model.load_state_dict(state, strict=True)
    assert state._metadata == model.state_dict()._metadata
    average = expected(run, "tensorflow")
    if dtype is None:
        check(state, run, "tensorflow")
    for name in average:
        assert state[name].dtype == (getattr(torch, dtype) if dtype else state[name].dtype)
        exact = torch.tensor(average[name].astype(np.float64))
        rounding = 2.0**-8 if dtype == "bfloat16" else 1e-6
        bound = max(rounding, 2.0**-8 * (average[name].dtype.itemsize == 2))
        torch.testing.assert_close(state[name].double(), exact, rtol=bound, atol=1e-12)
    if run != "lightning":
        tied = [state[name].data_ptr() for name in ("head.weight", "embedding.weight")]
        assert tied[0] == tied[1]


def test_a_folder_of_shards(tmp_path: Path) -> None:
    """Each shard loads, holds what the index says, and together they are the model."""
    for name, options in OPTIONS.items():
        out = tmp_path / name
        average_run(TORCH / "hf", f"{out}/", **options)
        index = json.loads((out / "pytorch_model.bin.index.json").read_text())
        shards = {file: load(out / file) for file in set(index["weight_map"].values())}
        assert sorted(shards) == sorted(path.name for path in out.glob("*.bin"))
        state = {key: shards[file][key] for key, file in index["weight_map"].items()}
        assert sum(map(len, shards.values())) == len(state)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        check(state, "hf", name)
        last = TORCH / "hf" / "checkpoint-30"
        assert (out / "config.json").read_bytes() == (last / "config.json").read_bytes()


def test_a_folder_in_new_shards(tmp_path: Path) -> None:
    """`--max-shard-size` cuts anew; from safetensors as well."""
    average_run(TORCH / "hf", f"{tmp_path}/a/", max_shard_size=400, **OPTIONS["ema"])
    index = json.loads((tmp_path / "a/pytorch_model.bin.index.json").read_text())
    state = {key: load(tmp_path / "a" / file)[key] for key, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) > 2
    check(state, "hf", "ema")


def test_weights_that_training_averaged(tmp_path: Path) -> None:
    """The raw ones beside them are averaged when asked for; the others stay."""
    out, last = tmp_path / "average.ckpt", TORCH / "lightning-ema" / "epoch=2-step=60.ckpt"
    average_run(TORCH / "lightning-ema", out, key="current_model_state", **OPTIONS["ema"])
    loaded, before = load(out), torch.load(last)
    check(loaded["current_model_state"], "lightning", "ema")
    assert differences(arrays(loaded["state_dict"]), arrays(before["state_dict"])) == []
    assert loaded["averaging_state"] == before["averaging_state"]


@pytest.mark.parametrize("key", ["netG", "netD", "/"])
def test_one_of_two_models(key: str, tmp_path: Path) -> None:
    """The other one stays the last one's, unless both are asked for."""
    average_run(TORCH / "gan", tmp_path / "gan.pt", key=key, average=["mean"])
    loaded, before = load(tmp_path / "gan.pt"), torch.load(TORCH / "gan" / "gan-30.pt")
    for name, model in {"netG": generator(), "netD": discriminator()}.items():
        model.load_state_dict(loaded[name], strict=True)
        run = [torch.load(TORCH / "gan" / f"gan-{step}.pt")[name] for step in (10, 20, 30)]
        mean = {k: torch.stack([one[k].double() for one in run]).mean(0).float() for k in run[0]}
        for k, tensor in loaded[name].items():
            wanted = mean[k] if key in (name, "/") else before[name][k]
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
        optimizer = f"opt{name[-1]}"
        torch.optim.Adam(model.parameters()).load_state_dict(loaded[optimizer])
        if key != "/":
            ours, theirs = (arrays(tensors(one[optimizer])) for one in (loaded, before))
            assert differences(ours, theirs) == []


def test_a_module_saved_whole(tmp_path: Path) -> None:
    """It comes back as the object it is, or as a state_dict that needs no class."""
    out = tmp_path / "kept.pt"
    average_run(TORCH / "whole", out, unknown="keep", **OPTIONS["ema"])
    model = load(out, weights_only=False)
    assert type(model) is Classifier
    check(model.state_dict(), "hf", "ema")
    with torch.no_grad():
        assert bool(torch.isfinite(model.eval()(torch.rand(2, 64))).all())
    average_run(TORCH / "whole", tmp_path / "dropped.pt", unknown="drop", **OPTIONS["ema"])
    check(load(tmp_path / "dropped.pt"), "hf", "ema")


def datasets(path: Path) -> dict[str, Array]:
    """Return what HDF5 reads."""
    found: dict[str, Array] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, one: found.update({name: one[()]} if isinstance(one, h5py.Dataset) else {})
        )
    return found


READERS = {
    ".safetensors": load_file,
    ".npz": lambda path: dict(np.load(path)),
    ".h5": datasets,
    "": theirs,
}


@pytest.mark.parametrize("suffix", READERS)
def test_through_other_formats_and_back(suffix: str, tmp_path: Path) -> None:
    """Each is read by its own library; PyTorch reads what is made of that."""
    options = {"names": "variable", **OPTIONS["tensorflow"]}
    over = tmp_path / f"average{suffix}"
    average_run(TORCH / "lightning", over, format=None if suffix else "tensorflow", **options)
    wanted = expected("lightning", "tensorflow")
    found = READERS[suffix](over)
    assert found.pop("network.1.num_batches_tracked") == 60
    assert differences(found, wanted) == []
    rename(over, tmp_path / "back.pt")
    check(load(tmp_path / "back.pt"), "lightning", "tensorflow")

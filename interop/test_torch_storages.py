"""Views, shared storages, dtypes and byte orders: PyTorch loads averages as it saved its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import differences, theirs
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch_support import arrays, load, plain, tensors

from ema_cli import average_run, rename
from ema_cli.errors import UnsupportedInput

State = OrderedDict[str, torch.Tensor]

DECAY = 0.9
OPTIONS: dict[str, Any] = {"decay": DECAY, "like": "torch"}
# Numbers of 8 bits are not averaged.
ALL: dict[str, Any] = {**OPTIONS, "select": [("exclude", "*float8*")]}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FIXED = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


def drawn(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return numbers of a dtype: small ones, as weights are."""
    rng = np.random.default_rng([seed, *shape])
    numbers = torch.from_numpy(rng.standard_normal(shape) * 3)
    if dtype in (torch.complex64, torch.complex128):
        return torch.complex(numbers, -2 * numbers).to(dtype)
    return numbers.abs().to(dtype) if not dtype.is_signed else numbers.to(dtype)


def everything(seed: int) -> State:
    """Return tensors that lie in their storages in all the ways a state_dict can have."""
    state: State = OrderedDict()
    for dtype in (*FLOATS, *FIXED):
        state[f"plain.{str(dtype).removeprefix('torch.')}"] = drawn(seed, dtype, 3, 5)
    for dtype in FLOATS:
        base = drawn(seed + 100, dtype, 8, 6)
        short = str(dtype).removeprefix("torch.")
        state[f"{short}.transposed"] = base.T
        state[f"{short}.sliced"] = base[1:7:2, 2:5]
        state[f"{short}.row"] = base[3]
        state[f"{short}.scalar"] = base[7, 5]
        state[f"{short}.one"] = base[2:3, 4:5]
        state[f"{short}.windows"] = base.flatten().unfold(0, 8, 4)
        state[f"{short}.diagonal"] = base.diagonal()
        state[f"{short}.expanded"] = drawn(seed + 200, dtype, 4, 1).expand(4, 1000)
        state[f"{short}.repeated"] = drawn(seed + 300, dtype, 1).expand(100, 100)
        state[f"{short}.channels_last"] = drawn(seed, dtype, 2, 3, 4, 5).to(
            memory_format=torch.channels_last
        )
        state[f"{short}.empty"] = torch.empty(0, 4, dtype=dtype)
        state[f"{short}.part"] = drawn(seed + 400, dtype, 100)[90:]
        state[f"{short}.parameter"] = torch.nn.Parameter(drawn(seed + 500, dtype, 4))
        state[f"{short}.negated"] = torch._neg_view(drawn(seed + 600, dtype, 4))
        state[f"{short}.side.left"], state[f"{short}.side.right"] = beside(seed, dtype)
    complexes = drawn(seed, torch.complex64, 3, 4)
    state["complex.conjugated"] = complexes.conj()
    state["complex.conjugated.transposed"] = complexes.T.conj()
    # Real views, which PyTorch does not save beside their complex storage.
    state["complex.real"] = drawn(seed + 1, torch.complex64, 3, 4).real
    state["complex.imag"] = drawn(seed + 2, torch.complex64, 3, 4).conj().imag
    return state


def beside(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a transposed tensor and one that begins where it ends."""
    base = drawn(seed + 700, dtype, 4, 3)
    return base[:2].T, base[2:]


def average(run: list[State]) -> dict[str, torch.Tensor]:
    """Return what AveragedModel makes of them: floating tensors one by one, others the last."""
    mix, found = get_ema_multi_avg_fn(DECAY), {}
    for name, last in run[-1].items():
        found[name] = last
        if last.dtype in FLOATS:
            values = [one[name].detach().resolve_neg().clone() for one in run]
            with torch.no_grad():
                for value in values[1:]:
                    mix([values[0]], [value], 1)
            found[name] = values[0]
    return found


def save(folder: Path, run: list[Any], **options: Any) -> Path:
    """Save a run as a training does and return its folder."""
    folder.mkdir()
    for step, value in enumerate(run, 1):
        torch.save(value, folder / f"model-{step}.pt", **options)
    return folder


@pytest.fixture(autouse=True)
def strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch checks that storages lie where it would compute them."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")


def check(path: Path, run: list[State], *, views: bool) -> None:
    """The file holds the average; if `views`, its tensors lie as those of the last checkpoint."""
    loaded = load(path)
    assert differences(arrays(loaded), arrays(average(run))) == []
    last = run[-1]
    assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in last.items()}
    if views:
        assert plain(loaded) == plain(dict(last))
        assert shared(loaded) == shared(last)
        for name, tensor in loaded.items():
            flags = tensor.is_conj(), tensor.is_neg(), tensor.storage_offset()
            assert flags == (last[name].is_conj(), last[name].is_neg(), last[name].storage_offset())
            assert tensor.untyped_storage().nbytes() == last[name].untyped_storage().nbytes()


def shared(state: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Return which tensors lie in one storage."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return {frozenset(names) for names in groups.values()}


@pytest.fixture(scope="module")
def run() -> list[State]:
    """Three checkpoints."""
    return [everything(seed) for seed in range(3)]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_copy_with_everything_in_it(protocol: int, run: list[Any], tmp_path: Path) -> None:
    """Storages are averaged once, whatever looks at them."""
    folder = save(tmp_path / "run", run, pickle_protocol=protocol)
    average_run(folder, tmp_path / "average.pt", **ALL)
    if protocol == 2:
        check(tmp_path / "average.pt", run, views=True)
    else:  # which PyTorch itself does not load safely
        loaded = torch.load(tmp_path / "average.pt", weights_only=False)
        assert differences(arrays(loaded), arrays(average(run))) == []


def test_a_new_file_with_everything_in_it(run: list[Any], tmp_path: Path) -> None:
    """From a file in the old format, or under other names: all but what is not as it is stored."""
    stored = [without(state, torch.Tensor.is_neg) for state in run]
    plainly = [without(state, torch.Tensor.is_conj) for state in stored]
    folder = save(tmp_path / "old", stored, _use_new_zipfile_serialization=False)
    average_run(folder, tmp_path / "a.pt", **ALL)
    check(tmp_path / "a.pt", plainly, views=False)
    folder = save(tmp_path / "run", stored)
    average_run(folder, tmp_path / "b.pt", rule=[(r"^", "model.")], **ALL)
    loaded = load(tmp_path / "b.pt")
    assert all(name.startswith("model.") for name in loaded)
    found = {name.removeprefix("model."): tensor for name, tensor in loaded.items()}
    assert differences(arrays(found), arrays(average(plainly))) == []
    with pytest.raises(UnsupportedInput, match="what is stored is its negative"):
        average_run(save(tmp_path / "negated", run), tmp_path / "c.safetensors", **ALL)


def without(state: State, what: Callable[[torch.Tensor], bool]) -> State:
    """Return the tensors of which something does not hold."""
    return OrderedDict((name, one) for name, one in state.items() if not what(one))


READERS = {".npz": lambda path: dict(np.load(path)), ".safetensors": load_file, "": theirs}


@pytest.mark.parametrize("suffix", READERS)
def test_views_in_formats_that_have_none(suffix: str, tmp_path: Path) -> None:
    """Averaged or only copied, every element is where it belongs."""
    run = []
    for seed in range(2):
        state: State = OrderedDict()
        for dtype in (torch.float64, torch.float32, torch.float16, torch.int32, torch.uint8):
            short = str(dtype).removeprefix("torch.")
            state[f"{short}.left"], state[f"{short}.right"] = beside(seed, dtype)
            state[f"{short}.windows"] = drawn(seed, dtype, 12).unfold(0, 8, 2).T
            state[f"{short}.expanded"] = drawn(seed, dtype, 1, 5).expand(7, 5)
            state[f"{short}.last"] = drawn(seed, dtype, 64, 9).to(torch.float32).T[::2]
        run.append(state)
    folder = save(tmp_path / "run", run)
    options = {"format": None if suffix else "tensorflow"}
    average_run(folder, tmp_path / f"average{suffix}", names="variable", **OPTIONS, **options)
    assert differences(READERS[suffix](tmp_path / f"average{suffix}"), arrays(average(run))) == []
    rule = [("^", "copy.")]
    rename(folder / "model-2.pt", tmp_path / f"copy{suffix}", rule=rule, **options)
    found = READERS[suffix](tmp_path / f"copy{suffix}")
    copies = {f"copy.{name}": array for name, array in arrays(run[-1]).items()}
    assert differences(found, copies) == []


def test_an_average_of_equals(run: list[Any], tmp_path: Path) -> None:
    """It is their checkpoint again, byte for byte but for the file's id."""
    folder = save(tmp_path / "run", [run[0], run[0]])
    average_run(folder, tmp_path / "model-2.pt", **ALL)
    ours, theirs = (
        {name: reader.get_record(name) for name in reader.get_all_records()}
        for reader in (
            torch._C.PyTorchFileReader(str(tmp_path / "model-2.pt")),
            torch._C.PyTorchFileReader(str(folder / "model-2.pt")),
        )
    )
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {".data/serialization_id"}
    assert ours.keys() == theirs.keys()


def big_endian(path: Path, width: int) -> None:
    """Rewrite a file, all of whose elements are this wide, as a big-endian machine saves it."""
    reader = torch._C.PyTorchFileReader(str(path))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in records.items():
        if name == "byteorder":
            data = b"big"
        elif name.startswith("data/"):
            data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
        if name not in ("version", ".data/serialization_id"):  # which it writes itself
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


@pytest.mark.parametrize("dtype", FLOATS)
def test_files_of_a_big_endian_machine(dtype: torch.dtype, tmp_path: Path) -> None:
    """The average is one too, or little-endian in a file of another layout."""
    run = []
    for seed in range(3):
        base = drawn(seed, dtype, 6, 7)
        run.append(OrderedDict(weight=base, view=base[1:3].T, bias=drawn(seed, dtype, 5)))
    folder = save(tmp_path / "run", run)
    for path in folder.iterdir():
        before = torch.load(path)
        big_endian(path, dtype.itemsize)
        assert differences(arrays(torch.load(path)), arrays(before)) == []
    average_run(folder, tmp_path / "average.pt", **OPTIONS)
    reader = torch._C.PyTorchFileReader(str(tmp_path / "average.pt"))
    assert reader.get_record("byteorder") == b"big"
    check_big(tmp_path / "average.pt", run)
    average_run(folder, tmp_path / "fresh.pt", rule=[("^bias$", "offset")], **OPTIONS)
    loaded = torch.load(tmp_path / "fresh.pt", weights_only=True)
    loaded["bias"] = loaded.pop("offset")
    assert differences(arrays(loaded), arrays(average(run))) == []


def check_big(path: Path, run: list[State]) -> None:
    """The file holds the average. Read whole, for PyTorch does not swap what it maps."""
    loaded = torch.load(path, weights_only=True)
    assert differences(arrays(loaded), arrays(average(run))) == []
    assert plain(loaded) == plain(dict(run[-1]))


def test_a_model_of_many_storages(tmp_path: Path) -> None:
    """More than a byte counts, more than 64 KiB of names, storages of many lengths."""
    run = []
    for seed in range(2):
        names = [f"blocks.{k}.{'long' * 50}.weight" for k in range(400)]
        run.append(
            OrderedDict(
                (name, drawn(seed + k, torch.float32, k % 67)) for k, name in enumerate(names)
            )
        )
    folder = save(tmp_path / "run", run)
    average_run(folder, tmp_path / "average.pt", **OPTIONS)
    check(tmp_path / "average.pt", run, views=True)
    average_run(folder, tmp_path / "fresh.pt", dtype="float64", **OPTIONS)
    loaded = load(tmp_path / "fresh.pt")
    assert list(loaded) == list(run[0])
    assert all(tensor.dtype == torch.float64 for tensor in tensors(loaded).values())

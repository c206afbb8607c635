"""`--key`: which of the models in a file; `--unknown`: what becomes of objects in its pickle."""

from __future__ import annotations

import pickletools
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import tensorflow_coefficient
from helpers import bits_equal, cmd, read_checkpoint, write_checkpoint
from torch_views import View, load, load_storages, write_views

import ema_cli
from ema_cli.errors import Disagreement, UnsupportedInput, UsageError
from ema_cli.formats.torch.encoding import encode
from ema_cli.formats.torch.nodes import Ordered, StorageRef, TensorRef
from ema_cli.formats.zips import NewMember, lay_out

Array = np.ndarray[Any, Any]
TORCH = Path(__file__).resolve().parent.parent / "fixtures" / "torch"
GAN, WHOLE, RUN = TORCH / "gan", TORCH / "whole", TORCH / "run"
SUFFIX = "/ExponentialMovingAverage"


def averaged(values: list[Array], decay: float = 0.9) -> Array:
    c = np.float32(float(tensorflow_coefficient(decay, None)))
    shadow = values[0]
    for value in values[1:]:
        shadow = np.asarray(shadow - np.asarray(shadow - value) * c)
    return shadow


def gans() -> list[dict[str, Any]]:
    return [load(GAN / f"gan-{step}.pt") for step in (10, 20, 30)]


def names_in(path: Path) -> set[str]:
    """The names that the pickle of a PyTorch file mentions."""
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        operations = pickletools.genops(archive.read(pickled))
        return {str(arg).replace(" ", ".") for code, arg, _ in operations if code.name == "GLOBAL"}


# ---------------------------------------------------------------------------- which model


def test_two_models_are_a_choice(tmp_path: Path) -> None:
    """Exit 13, with both, what they hold, and what to write."""
    for command in ("plan", "run"):
        done = cmd(command, GAN, "-o", tmp_path / "out.pt", "--decay", "0.9", code=13)
        assert "gan-10.pt: expected one model, found 2 that may be: " in done.err
        assert "netG (4 tensors, 2.4 KiB), netD (4 tensors, 1.0 KiB)" in done.err
        assert "hint: choose one, such as --key netG, or all of them with --key /" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("key", ["netG", "netD"])
def test_the_model_at_a_key_is_averaged(tmp_path: Path, key: str, suffix: str) -> None:
    """Copies keep the other model as it was last; new files hold the chosen one alone."""
    out = tmp_path / f"out{suffix}"
    cmd("run", GAN, "-o", out, "--key", key, "--decay", "0.9", "--names", "variable")
    values = gans()
    if suffix == ".pt":
        root = load(out)
        assert list(root) == list(values[-1])
        found, other = root[key], root["netD" if key == "netG" else "netG"]
        for name, array in values[-1]["netD" if key == "netG" else "netG"].items():
            assert bits_equal(other[name], array), name
        assert root["iteration"] == values[-1]["iteration"]
    else:
        found = read_checkpoint(out)
    assert set(found) == set(values[-1][key])
    for name in found:
        assert bits_equal(found[name], averaged([one[key][name] for one in values])), name


def test_all_models_are_averaged_with_a_slash(tmp_path: Path) -> None:
    """Names then begin with the key they have in the file; optimizers are none of them."""
    out = tmp_path / "out.safetensors"
    cmd("run", GAN, "-o", out, "--key", "/", "--decay", "0.9", "--names", "variable")
    found, values = read_checkpoint(out), gans()
    wanted = {f"{key}.{name}": key for key in ("netG", "netD") for name in values[-1][key]}
    assert set(found) == set(wanted)
    for name, key in wanted.items():
        inner = name.removeprefix(f"{key}.")
        assert bits_equal(found[name], averaged([one[key][inner] for one in values])), name


@pytest.mark.parametrize("key", ["net", "netG/weight", "netg", "G", "netG.netG", "iteration"])
def test_a_wrong_key_lists_what_there_is(tmp_path: Path, key: str) -> None:
    """Exit 2; of a single file that was named as of a run."""
    for what in ([GAN], [GAN / "gan-10.pt", GAN / "gan-20.pt"]):
        done = cmd("plan", *what, "-o", tmp_path / "o.pt", "--key", key, code=2)
        assert f"--key '{key}': " in done.err
        assert "holds no tensors there" in done.err
        listed = "netG (4 tensors, 2.4 KiB), netD (4 tensors, 1.0 KiB), optG (12 tensors, "
        assert f"it holds {listed}" in done.err.split("hint: ")[1]


def test_commands_that_look_take_a_key_too(tmp_path: Path) -> None:
    """inspect, diff, map and rename."""
    path = GAN / "gan-10.pt"
    shown = cmd("inspect", path, "--key", "netD").out
    assert "variable" in shown
    cmd("inspect", path, "--key", "nowhere", code=2)
    cmd("diff", path, path, "--key", "netG")
    cmd("diff", path, GAN / "gan-20.pt", "--key", "netG", code=13)
    cmd("map", path, "--key", "netG", code=13)  # no shadows in it
    out = tmp_path / "out.safetensors"
    cmd("rename", path, "-o", out, "--key", "netD", "--names", "shadow")
    values = gans()[0]["netD"]
    found = read_checkpoint(out)
    for name, array in values.items():
        assert bits_equal(found[name + SUFFIX], array), name


@pytest.mark.parametrize("command", ["plan", "run"])
def test_formats_that_hold_one_model_take_no_key(tmp_path: Path, command: str) -> None:
    """Exit 2: for safetensors, a folder of them, and NumPy archives."""
    for k in (1, 2):
        write_checkpoint(tmp_path / "a" / f"m-{k}.safetensors", {"w": np.float32([k])})
        write_checkpoint(tmp_path / "b" / f"checkpoint-{k}" / "model.safetensors", {"w": [1.0]})
        (tmp_path / "c").mkdir(exist_ok=True)
        np.savez(tmp_path / "c" / f"m-{k}.npz", w=np.float32([k]))
    for folder, title in (("a", "safetensors file"), ("b", "Hugging Face"), ("c", "NumPy archive")):
        words = [tmp_path / folder, "-o", tmp_path / "out", "--key", "model"]
        done = cmd(command, *words, code=2)
        assert "--key model: " in done.err
        assert title in done.err
        assert "hint: leave out --key" in done.err
    with pytest.raises(UsageError, match="--key model"):
        ema_cli.inspect(tmp_path / "a" / "m-1.safetensors", key="model")


# ---------------------------------------------------------------------------- nested and greedy


def state(key: str) -> Ordered:
    """A model of one tensor; the storage `key` holds it."""
    ref = TensorRef(StorageRef(key, "float32", 2, "cpu"), "float32", 0, (2,), (1,))
    return Ordered([("w", ref)])


def write_nested(path: Path, root: Any, storages: dict[str, Array]) -> Path:
    """Write a file with any root."""
    parts = {"data.pkl": encode(root), "byteorder": b"little"}
    parts |= {f"data/{key}": array.tobytes() for key, array in storages.items()}
    parts["version"] = b"3\n"
    members = [NewMember(f"archive/{name}", raw, len(raw)) for name, raw in parts.items()]
    laid = lay_out(members, torch=True)
    raw = bytearray(laid.total)
    for offset, data in laid.literals:
        raw[offset : offset + len(data)] = data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


GREEDY: dict[str, tuple[str, str]] = {
    "the longest name first": ("a.b", "1"),
    "a part of it": ("a/b", "0"),
    "deeper": ("a.b/c", "2"),
    "a slash at its end": ("x/", "3"),
    "both kinds of slashes": ("/x/", "3"),
}


def greedy_run(folder: Path) -> Path:
    """Names with dots and names without, of which one key can mean several."""
    for k in (1, 2):
        storages = {key: np.float32([k * 10 + int(key), 0]) for key in "0123"}
        root = {
            "a": {"b": state("0")},
            "a.b": {**state("1"), "c": state("2")},
            "x": state("3"),
        }
        write_nested(folder / f"m-{k}.pt", root, storages)
    return folder


@pytest.mark.parametrize("case", GREEDY)
def test_keys_take_the_longest_name_there_is(tmp_path: Path, case: str) -> None:
    """`a.b` is the entry of that name rather than the b of a; with a slash it is that."""
    key, storage = GREEDY[case]
    run = greedy_run(tmp_path / "run")
    out = tmp_path / "out.safetensors"
    options: dict[str, Any] = {"average": ["mean"], "names": "variable"}
    ema_cli.average_run(run, out, key=key, **options)
    assert read_checkpoint(out)["w"].tolist() == [15 + int(storage), 0]


def test_a_greedy_name_that_leads_nowhere_is_left(tmp_path: Path) -> None:
    """`a.b.d` cannot be in `a.b`, but it is the d of the b of a."""
    for k in (1, 2):
        storages = {"0": np.float32([k, 7]), "1": np.float32([9, 9])}
        root = {"a": {"b": {"d": state("0")}}, "a.b": {"c": state("1")}}
        write_nested(tmp_path / "run" / f"m-{k}.pt", root, storages)
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(tmp_path / "run", out, key="a.b.d", average=["mean"], names="variable")
    assert read_checkpoint(out)["w"].tolist() == [1.5, 7]


def test_models_at_different_keys_are_no_run(tmp_path: Path) -> None:
    """A checkpoint without that key: it was named, or it is unusable."""
    views = {"w": View("0", (2,), (1,))}
    for k in (1, 2):
        write_views(tmp_path / "run" / f"m-{k}.pt", {"0": np.float32([k, 1])}, views, {"step": k})
    write_nested(tmp_path / "run" / "m-3.pt", {"other": state("0")}, {"0": np.float32([3, 1])})
    words = ["-o", tmp_path / "out.safetensors", "--average", "mean", "--key", "model"]
    cmd("run", tmp_path / "run" / "m-1.pt", tmp_path / "run" / "m-3.pt", *words, code=2)


# ---------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    "words",
    [
        [GAN, "--key", "netG"],
        [GAN, "--key", "/", "--unknown", "keep"],
        [WHOLE, "--unknown", "drop"],
        [WHOLE, "--unknown", "keep", "--statistics", "copy"],
    ],
    ids=["key", "key and unknown", "drop", "keep"],
)
def test_commands_in_hints_keep_the_options(tmp_path: Path, words: list[Any]) -> None:
    """What first-dominates proposes can be run as it stands."""
    out = tmp_path / "out.pt"
    done = cmd("plan", *words, "-o", out, "--decay", "0.999")
    assert "first-dominates" in done.err
    line = next(
        line.partition("ema-avg ")[2] for line in done.err.splitlines() if "ema-avg run" in line
    )
    proposed = shlex.split(line, comments=True)
    for word in map(str, words):
        assert word in proposed
    assert cmd(*proposed).out.startswith("written")
    assert out.exists()


# ---------------------------------------------------------------------------- unknown objects


@pytest.mark.parametrize("words", [[], ["--unknown", "refuse"]])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_unknown_objects_are_refused(tmp_path: Path, command: str, words: list[str]) -> None:
    """In a copy, whose pickle would hold them; exit 12, and both ways out."""
    done = cmd(command, WHOLE, "-o", tmp_path / "out.pt", "--decay", "0.9", *words, code=12)
    assert (
        "names that are neither PyTorch's nor known plain data: networks.Classifier, " in done.err
    )
    assert "--unknown drop" in done.err
    assert "--unknown keep" in done.err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedInput, match=r"networks\.Classifier"):
        ema_cli.plan_run(WHOLE, tmp_path / "out.pt", decay=0.9)


def test_formats_without_pickles_need_no_choice(tmp_path: Path) -> None:
    """The tensors of the model are read all the same."""
    out = tmp_path / "out.safetensors"
    cmd("run", WHOLE, "-o", out, "--decay", "0.9", "--names", "variable")
    same = tmp_path / "hf.safetensors"
    cmd("run", TORCH / "hf", "-o", same, "--decay", "0.9", "--names", "variable")
    found, expected = read_checkpoint(out), read_checkpoint(same)
    assert found.keys() == expected.keys()
    assert all(bits_equal(found[name], expected[name]) for name in found)


def test_unknown_objects_are_kept(tmp_path: Path) -> None:
    """A copy with other storages: the pickle is the input's, byte for byte, and said to be one."""
    out = tmp_path / "out.pt"
    words = [WHOLE, "-o", out, "--decay", "0.9", "--unknown", "keep"]
    assert "loads with weights_only=False only" in cmd("plan", *words).out
    cmd("run", *words)
    last = WHOLE / "model-30.pt"
    assert names_in(out) == names_in(last)
    assert out.stat().st_size == last.stat().st_size
    expected = tmp_path / "out.safetensors"
    cmd("run", WHOLE, "-o", expected, "--decay", "0.9", "--names", "variable")
    averages = {array.tobytes() for array in read_checkpoint(expected).values()}
    assert set(load_storages(out).values()) == averages
    assert set(load_storages(last).values()) != averages


def test_unknown_objects_are_dropped(tmp_path: Path) -> None:
    """What is left is a state_dict that weights_only=True loads, of the names in the model."""
    out = tmp_path / "out.pt"
    words = [WHOLE, "-o", out, "--decay", "0.9", "--unknown", "drop"]
    assert "holds the state_dict of the model" in cmd("plan", *words).out
    cmd("run", *words)
    allowed = (
        "collections.OrderedDict",
        "torch._utils.",
        "torch.FloatStorage",
        "torch.LongStorage",
    )
    assert all(name.startswith(allowed) for name in names_in(out))
    expected = tmp_path / "out.safetensors"
    cmd("run", WHOLE, "-o", expected, "--decay", "0.9", "--names", "variable")
    found = load(out)
    for name, array in read_checkpoint(expected).items():
        assert bits_equal(found[name], array), name
    cmd("diff", out, expected)


@pytest.mark.parametrize("unknown", ["refuse", "keep", "drop"])
def test_plain_data_needs_no_choice(tmp_path: Path, unknown: str) -> None:
    """`argparse.Namespace` and the like are known to be data: a copy keeps them either way."""
    out = tmp_path / "out.pt"
    cmd("run", RUN, "-o", out, "--decay", "0.9", "--unknown", unknown)
    assert "argparse.Namespace" in names_in(out)
    assert names_in(out) == names_in(RUN / "ckpt-40.pt")


def test_unknown_takes_three_words(tmp_path: Path) -> None:
    """By the command and by the function."""
    done = cmd("run", WHOLE, "-o", tmp_path / "o.pt", "--unknown", "load", code=2)
    assert "'refuse', 'keep', 'drop'" in done.err
    with pytest.raises(UsageError, match="unknown: expected one of refuse, keep, drop"):
        ema_cli.average_run(WHOLE, tmp_path / "o.pt", decay=0.9, unknown="load")


def test_a_key_and_dropped_objects_go_together(tmp_path: Path) -> None:
    """The model of a GAN beside which no object stands is a copy, as without the option."""
    outs = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for out, more in zip(outs, ([], ["--unknown", "drop"]), strict=True):
        cmd("run", GAN, "-o", out, "--decay", "0.9", "--key", "netG", *more)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_disagreement_is_raised_by_the_function(tmp_path: Path) -> None:
    """As the command exits with 13."""
    with pytest.raises(Disagreement, match="expected one model, found 2"):
        ema_cli.plan_run(GAN, tmp_path / "out.pt", decay=0.9)

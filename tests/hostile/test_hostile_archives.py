"""Hostile npz, torch, HDF5 and Keras files: refused in one line, or read as the data they are.

Each attack is tried in a process of its own, under an audit hook and with a canary beside it:
see `watching.warden`. What a sound file of the same format makes happen is allowed, nothing else.
"""

from __future__ import annotations

import json
import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attacks import Attack
from helpers import read_checkpoint
from jobs import ENOUGH, WATCHING, Report, Warden, environment, prepare, suffix_of, watched
from keras_attacks import KERAS_ATTACKS
from npz_attacks import NPZ_ATTACKS
from torch_attacks import TORCH_ATTACKS
from zip_attacks import ZIP_ATTACKS

ALL = {"npz": (*NPZ_ATTACKS, *ZIP_ATTACKS), "torch": TORCH_ATTACKS, "keras": KERAS_ATTACKS}
# What is read, or refused for a reason that has nothing to do with an attack.
SOUND = {
    "npz": ("a comment", "deflated", "half a file", "a flipped byte"),
    "torch": (
        "no byte order",
        "no CRCs at all",
        "no data.pkl",
        "a flipped byte",
        "an element said 12 times",
    ),
    "keras": (
        "two names of one dataset",
        "half a file",
        "a config that is without layers",
        "deflated weights",
        "an old config that is no JSON",
        "assets that climb",
    ),
}
EVERY = [(kind, attack) for kind, table in ALL.items() for attack in table]
each = pytest.mark.parametrize(("kind", "attack"), EVERY, ids=[f"{k}: {a.name}" for k, a in EVERY])
LIMIT = 300 << 10  # KiB
# The HDF5 library inflates a chunk to whatever it is: its process is given so much, and no more.
HELPER_LIMIT = 900 << 10
SHADOW = "/ExponentialMovingAverage"
LINUX = sys.platform == "linux"


@pytest.fixture(scope="session")
def wardens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Warden]:
    """One warden per format, all at work at once."""
    return {
        kind: Warden(table, tmp_path_factory.mktemp(kind), [by_name(kind, n) for n in SOUND[kind]])
        for kind, table in ALL.items()
    }


@pytest.fixture(scope="session")
def reports(wardens: dict[str, Warden]) -> Iterator[dict[str, dict[str, Report]]]:
    """What came of every attack, by format and name; tells the longest time and most memory."""
    found = {}
    for kind, warden in wardens.items():
        all_reports = warden.reports()
        found[kind] = dict(
            zip((a.name for a in ALL[kind]), all_reports[len(SOUND[kind]) :], strict=True)
        )
        found[f"sound {kind}"] = dict(zip(SOUND[kind], all_reports, strict=False))
    yield found
    times = [
        (d["seconds"], kind, name)
        for kind, r in found.items()
        for name, x in r.items()
        for d in x.done.values()
    ]
    peaks = [(x.peak, kind, name) for kind, r in found.items() for name, x in r.items()]
    print(f"\nhostile files: longest {max(times)}, most memory {max(peaks)} KiB")


def by_name(kind: str, name: str) -> Attack:
    """Return an attack."""
    return next(attack for attack in ALL[kind] if attack.name == name)


def test_every_item_has_an_attack() -> None:
    """The list of attacks is numbered; those on these formats are 44 to 99."""
    tested_elsewhere = {97}
    items = {item for _, attack in EVERY for item in attack.items}
    assert items | tested_elsewhere == set(range(44, 100))
    for table in ALL.values():
        assert len({attack.name for attack in table}) == len(table)


@each
def test_it_ends_as_it_must(
    kind: str, attack: Attack, reports: dict[str, dict[str, Report]]
) -> None:
    """Each command ends by itself, with its code; a refusal is one line that names the file."""
    report = reports[kind][attack.name]
    assert report.end == ""
    codes = {name: done["code"] for name, done in report.done.items()}
    ends = attack.ends._asdict()
    told = "\n".join(f"{name}: {done['err']}" for name, done in report.done.items())
    assert codes == {name: ends[name] for name in codes}, told
    for done in report.done.values():
        refused_in_one_line(done["err"], report.path, attack, done["code"])


def refused_in_one_line(err: str, path: Path, attack: Attack, code: int) -> None:
    """Check what a command said."""
    assert "Traceback" not in err
    assert err.replace("\n", "").isprintable()
    errors = [line for line in err.splitlines() if line.startswith("ema-avg: error: ")]
    assert len(errors) == (1 if code else 0), err
    for line in errors:
        assert path.name in line
        assert len(line) < 2000
        for word in attack.words:
            assert word in line


@each
def test_nothing_else_happens(
    kind: str, attack: Attack, reports: dict[str, dict[str, Report]]
) -> None:
    """No import, no code, no process, no file but its own; nothing is written by a refusal."""
    report = reports[kind][attack.name]
    sound = reports[f"sound {kind}"].values()
    assert sorted(report.events.difference(*(r.events for r in sound))) == []
    assert sorted(report.modules.difference(*(r.modules for r in sound))) == []
    assert report.touched == []
    made = {name for name, done in report.done.items() if done["code"] == 0} - {"inspect", "plan"}
    allowed = tuple(f"out/{name}" for name in made)
    written = [name for name in report.changed if name != "out"]
    assert [name for name in written if not name.startswith(allowed or ("nothing",))] == []


@each
def test_it_takes_no_memory(
    kind: str, attack: Attack, reports: dict[str, dict[str, Report]]
) -> None:
    """What a file claims is never allocated."""
    report = reports[kind][attack.name]
    assert report.peak < LIMIT
    assert report.helper < HELPER_LIMIT


@pytest.mark.parametrize(
    ("kind", "attack"),
    [(k, a) for k, a in EVERY if a.ends.other == 0],
    ids=[f"{k}: {a.name}" for k, a in EVERY if a.ends.other == 0],
)
def test_what_is_read_is_read_right(
    kind: str, attack: Attack, reports: dict[str, dict[str, Report]]
) -> None:
    """The values are those that the file holds."""
    report = reports[kind][attack.name]
    found = read_checkpoint(report.folder / "out" / "other.safetensors")
    plain = {name.removesuffix(SHADOW): value for name, value in found.items()}
    for name, value in (attack.values or {}).items():
        assert plain[name].dtype == value.dtype
        np.testing.assert_array_equal(plain[name], value)


KEPT = {
    "collections OrderedDict",
    "torch FloatStorage",
    "torch._utils _rebuild_tensor_v2",
    "_codecs encode",
    "__builtin__ set",
}


@pytest.mark.parametrize(
    "attack",
    [attack for attack in ALL["torch"] if attack.ends.dropped == 0],
    ids=lambda attack: attack.name,
)
def test_what_is_dropped_is_gone(attack: Attack, reports: dict[str, dict[str, Report]]) -> None:
    """A file without the unknown names no function at all but those that make tensors."""
    report = reports["torch"][attack.name]
    with zipfile.ZipFile(report.folder / "out" / "dropped.pt") as file:
        [name] = [name for name in file.namelist() if name.endswith("data.pkl")]
        pickle = file.read(name)
    opcodes = list(pickletools.genops(pickle))
    assert {arg for opcode, arg, _ in opcodes if opcode.name == "GLOBAL"} <= KEPT
    assert not {opcode.name for opcode, _, _ in opcodes} & {"STACK_GLOBAL", "INST", "OBJ"}
    for done in (report.done["plan"], report.done["same"]):
        assert "--unknown drop" in done["err"]


# ---------------------------------------------------------------------------- as a user would

# One of each kind, through the command itself: the process of its own is then the user's.
AS_USER = (
    ("npz", "a bomb that says it is small"),
    ("npz", "an array of objects"),
    ("npz", "a call"),
    ("npz", "a chain of bombs"),
    ("torch", "REDUCE of os.system"),
    ("torch", "a call that is popped"),
    ("torch", "a subclass that calls"),
    ("torch", "10^5 lists deep"),
    ("torch", "a pickle that is a bomb"),
    ("keras", "an external link to data"),
    ("keras", "external storage"),
    ("keras", "a virtual dataset of itself"),
    ("keras", "a tree that is its own neighbour"),
    ("keras", "a chunk that is a bomb"),
    ("keras", "blosc"),
)


@pytest.mark.parametrize(("kind", "name"), AS_USER, ids=[f"{k}: {n}" for k, n in AS_USER])
def test_as_a_command(tmp_path: Path, kind: str, name: str) -> None:
    """``ema-avg run`` refuses it too, and the interpreter does nothing else from its first line."""
    attack = by_name(kind, name)
    path, _ = prepare(attack, tmp_path / "job")
    log = tmp_path / "log"
    out = path.parent.parent / "out" / f"same{suffix_of(path)}"
    done = subprocess.run(
        [sys.executable, "-m", "ema_cli", "run", path, "-o", out],
        env={**os.environ, **environment(out.parent.parent), **watched(out.parent.parent, log)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 12
    refused_in_one_line(done.stderr, path, attack, 12)
    assert done.stdout == ""
    assert list(out.parent.iterdir()) == []
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    assert ["import", "ema_cli.cli"] in seen
    assert [event for event in seen if event[0] in FORBIDDEN or "canary" in event] == []


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "pickle.find_class",
)


@pytest.mark.skipif(not LINUX, reason="needs inotify")
def test_the_watch_sees_what_is_forbidden(tmp_path: Path) -> None:
    """A process that does what no attack may do is told on, deed by deed."""
    _, job = prepare(by_name("npz", "a comment"), tmp_path / "job")
    job["commands"] = [[]]
    done = subprocess.run(
        [sys.executable, WATCHING / "warden.py"],
        input=json.dumps(job) + "\n",
        capture_output=True,
        text=True,
        timeout=ENOUGH,
    )
    told = json.loads(done.stdout)
    assert told["touched"] == ["pwned", "secret.bin"]
    for event in (
        ["exec", "<string>"],
        ["import", "antigravity_of_nobody"],
        ["os.system", "true"],
        ["open", "canary", "r"],
        ["open", "canary", "w"],
        ["open", "/etc/hostname", "r"],
        ["os.listdir", "/"],
        ["import", "socket"],
    ):
        assert event in told["events"]
    assert any(event[0] == "socket.__new__" for event in told["events"])

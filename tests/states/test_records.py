"""Small files of a state that lie, and flipped bits: it is told, and nothing else happens."""

from __future__ import annotations

import copy
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stores import (
    document,
    documents,
    manifest_of,
    rewrite,
    sealed,
    slot_of,
    tree,
    update,
    without_barriers,
    write_steps,
)

import ema_cli
from ema_cli.cli import stateview
from ema_cli.errors import Disagreement, EmaError, InputError, NonFinite, NothingToAverage
from ema_cli.states import summary
from ema_cli.views import Out

Made = tuple[Path, list[Path], dict[str, Any]]
# Damage, or another run than it is given, as far as it can know.
TOLD = (InputError, Disagreement, NonFinite, NothingToAverage)
GIVEN: dict[str, Any] = {"average": ["power:0.1", "ema:0.9/step"], "num_updates": "step"}
OUT = "{average}.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A size that is believed shall end the test, not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = Path("/proc/self/statm")
    if taken.exists():
        pages = int(taken.read_text().split()[0])
        limit = pages * resource.getpagesize() + (3 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module", name="made")
def a_sound_state(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A state, its run with one checkpoint more, and what can be done with it."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        without_barriers(patch)
        paths = write_steps(folder / "run", [100, 200, 300])
        update(folder / "S", paths[:2], **GIVEN)
        sound = Path(shutil.copytree(folder / "S", folder / "used"))
        return folder / "S", paths, tried(sound, paths, folder)


def tried(state: Path, paths: list[Path], folder: Path) -> dict[str, Any]:
    """Return what came of each command: the error, or what it made."""

    def shown() -> object:
        found = summary.summarize(str(state))
        stateview.show(Out(as_json=True, quiet=True), found)
        return found.weights, [row.step for row in found.rows]

    def verified() -> object:
        with ThreadPoolExecutor(1) as executor:
            return summary.check(str(state), executor).step

    def mixed() -> object:
        done = update(state, paths, **GIVEN)
        return [row.step for row in done.applied], slot_of(state).read_bytes()

    def out() -> object:
        shutil.rmtree(folder / "out", ignore_errors=True)
        ema_cli.export(state, folder / "out" / OUT)
        return {name: data for name, data in tree(folder / "out").items() if "json" not in name}

    commands: dict[str, Callable[[], object]] = {
        "inspect": shown,
        "verify": verified,
        "export": out,
        "plan": lambda: len(ema_cli.plan_run(paths, state=state, **GIVEN).outcomes),
        "run": mixed,
    }
    found: dict[str, Any] = {}
    for name, command in commands.items():
        try:
            found[name] = command()
        except EmaError as error:
            assert str(error).isprintable(), error
            found[name] = error
    return found


def check(
    made: Made, folder: Path, damage: Callable[[Path], object], *, likely: bool = False
) -> None:
    """Damage a copy of the state: every command tells, or does what it did.

    `likely`: it tells what might be true of another state, and is believed then.
    """
    state, paths, sound = made
    state = Path(shutil.copytree(state, folder / "S"))
    damage(state)
    before = tree(state)
    found = tried(state, paths, folder)
    for name, result in found.items():
        if isinstance(result, EmaError):
            assert isinstance(result, TOLD), result
        else:
            assert likely or result == sound[name], name
    if isinstance(found["run"], EmaError):
        now = tree(state)
        assert all(now[name] == before[name] for name in ("ROOT", "ledger", "plan"))


# ---------------------------------------------------------------------------- changes

ANY = (None, True, -1, 1.5, "", "x", [], [[]], {}, {"x": 1}, 1 << 62, 10**30)
Change = Callable[[Any], object]


def replaced(*path: Any, value: Any) -> Change:
    """Return what puts a value where `path` leads to in a document."""

    def change(root: Any) -> None:
        place = root
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = copy.deepcopy(value)

    return change


def removed(*path: Any) -> Change:
    """Return what takes away where `path` leads to."""

    def change(root: Any) -> None:
        place = root
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def named(prefix: str, path: tuple[Any, ...], given: Iterator[Any] | Any) -> dict[str, Change]:
    """Return a change for each value, with a name."""
    where = ".".join(map(str, path))
    return {f"{prefix} {where} {value!r}"[:70]: replaced(*path, value=value) for value in given}


FIELDS = ("state", "uuid", "epoch", "generation", "slot", "plan", "manifest", "ledger")
ROOTS: dict[str, Change] = {
    **{name: change for f in FIELDS for name, change in named("root", (f,), ANY).items()},
    **{f"root without {f}": removed(f) for f in FIELDS},
    **named("root", ("state",), (0, 2, 1.0, "1")),
    **named("root", ("slot",), (1, 2, 10**9, 1 << 61)),
    **named("root", ("generation",), (0, 2, 1 << 61)),
    **named("root", ("ledger",), ([1], [1, 2, 3], ["1", 2], [0, 0], [-1, 0], [1 << 61, 0])),
    **named("root", ("ledger", 0), (0, 1, 10, 10**6)),
    **named("root", ("manifest",), (0, 1 << 32)),
}
HELD = ("held", 0)
MANIFESTS: dict[str, Change] = {
    **{
        name: change
        for f in ("generation", "held", "checksums", "skeleton", "complete", "own")
        for name, change in named("manifest", (f,), ANY).items()
    },
    **{f"manifest without {f}": removed(f) for f in ("generation", "held", "own", "complete")},
    **named("manifest", HELD, ANY),
    **{
        name: change
        for k in range(5)
        for name, change in named("held", (*HELD, k), (*ANY, ["float32"], {"a": []})).items()
    },
    **named(
        "held", (*HELD, 0), ("\0", "\ud800", "__metadata__", "x" * 100_000, "power-0.1/kernel")
    ),
    **named(
        "held",
        (*HELD, 1),
        (
            "float33",
            "string",
            "variant",
            "int4",
            "bool",
            "int8",
            "float64",
            "float16",
            "complex128",
        ),
    ),
    **named(
        "held",
        (*HELD, 2),
        (
            *([-3, 5], [5, 3], [15], [3, 5, 1], [True, 15], [3.0, 5], ["3", 5], [[3], 5]),
            *([0], [1 << 61], [1 << 61, 0], [1 << 20, 1 << 20], [1 << 31] * 3, [1] * 10_000),
        ),
    ),
    **named("held", (*HELD, 3), ("copy", "biased", "local_step", "AVERAGE")),
    **named("held", (*HELD, 4), (1, 2, 7, 1 << 61, 0.0)),
    **{
        f"held variables {value!r}": lambda d, value=value: d["held"][0].append(value)
        for value in (
            *ANY,
            ["bias"],
            ["seen"],
            ["nothing"],
            ["kernel", "kernel"],
            ["kernel", "bias"],
        )
    },
    "a tensor less": removed("held", 0),
    "the last one less": removed("held", -1),
    "a tensor twice": lambda d: d["held"].append(d["held"][0]),
    "another order": lambda d: d["held"].reverse(),
    "a tensor more": lambda d: d["held"].append(["more", "float32", [1], "copy", 0]),
    "only copies": lambda d: d.update(held=[one for one in d["held"] if one[3] == "copy"]),
    **named("manifest", ("checksums",), ([0], [1 << 32], ["x"], [1.0], [0, 0], [None])),
    **named("manifest", ("generation",), (0, 2)),
    "no file kept": replaced("skeleton", "files", value=[]),
    **named("skeleton", ("skeleton", "files", 0, "name"), ("../ROOT", "", "/etc/passwd", "x")),
    **named("skeleton", ("skeleton", "path"), ("../ROOT", "..", "x")),
    **named("skeleton", ("skeleton", "format"), ("npz", "tensorflow", "hdf5", "torch")),
    **named("skeleton", ("skeleton", "files", 0, "size"), (0, 10, 1 << 61)),
    **named("skeleton", ("skeleton", "files", 0, "pieces"), ([], [[0, 10]], [[0, 1 << 61]])),
    **named("skeleton", ("skeleton", "files", 0, "crc"), (0, 1 << 32)),
    **named("skeleton", ("skeleton", "roles"), ({"kernel": "OPTIMIZER"}, {"kernel": "x"})),
}
ROW_FIELDS = ("step", "name", "path", "files", "coefficients", "missed", "generation")
ROWS: dict[str, Change] = {
    **named("ledger", (0,), (x for x in ANY)),
    **{
        name: change
        for k in (0, 1)
        for f in ROW_FIELDS
        for name, change in named("row", (k, f), ANY).items()
    },
    **{f"row without {f}": removed(1, f) for f in ROW_FIELDS},
    **named("row", (0, "step"), (0, 200, 300, 1 << 80, 10**400, -(10**400))),
    **named("row", (1, "step"), (0, 100, 201, 300, 10**400)),
    **named("row", (1, "name"), ("\0", "\ud800", "\x1b[2J", "x" * 100_000)),
    **named("row", (1, "path"), ("\0", "\ud800", "\x1b[2J", "/", "..", "x" * 100_000)),
    **named(
        "row",
        (1, "files"),
        (
            *(
                [[]],
                [["x"]],
                [["x", 1, 1]],
                [["x", 1, 1, 1]],
                [["x", "1", 1, "a"]],
                [[1, 1, 1, "a"]],
            ),
            *([["x", -1, -1, ""]], [["\0", 1, 1, "a"]], [["/", 1 << 80, 1 << 80, "a"]]),
        ),
    ),
    **named("row", (1, "coefficients"), ([], ["0x1p-1"], ["0x1p-1"] * 3, [0.5, 0.5], ["x", "x"])),
    **named(
        "coefficient",
        (1, "coefficients", 1),
        (
            "nan",
            "inf",
            "-inf",
            "0x1p-2",
            "1",
            "0",
            "-0x1p-1",
            "0x1p99999",
            "0x1p-1\n",
            "0." + "5" * 9999,
        ),
    ),
    **named("row", (0, "coefficients"), ([], ["0x1p+0"], ["0x0p+0", "0x0p+0"])),
    **named("row", (1, "missed"), ("it was gone", "\x1b[2J")),
    "all missed": lambda rows: [row.update(missed="gone") for row in rows],
    "no rows": lambda rows: rows.clear(),
    "one row": lambda rows: rows.pop(),
    "the other order": lambda rows: rows.reverse(),
    "a row twice": lambda rows: rows.append(rows[1]),
    "more rows": lambda rows: rows.append({**rows[1], "step": 250}),
}


@pytest.mark.parametrize("change", ROOTS.values(), ids=ROOTS)
def test_a_hostile_root(change: Change, made: Made, tmp_path: Path) -> None:
    """Nothing it says leads anywhere else."""

    def damage(state: Path) -> None:
        root = document(state, "ROOT")
        change(root)
        (state / "ROOT").write_bytes(sealed(root))

    check(made, tmp_path, damage)


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_hostile_manifest(change: Change, made: Made, tmp_path: Path) -> None:
    """Names, shapes and sizes are checked before anything is made of them."""

    def damage(state: Path) -> None:
        manifest = document(state, manifest_of(state))
        change(manifest)
        rewrite(state, manifest=manifest)

    check(made, tmp_path, damage)


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_a_hostile_ledger(change: Change, made: Made, tmp_path: Path) -> None:
    """Steps and coefficients decide about bits, names and paths are for people."""

    def damage(state: Path) -> None:
        rows = documents(state, "ledger")
        change(rows)
        rewrite(state, ledger=rows)

    check(made, tmp_path, damage, likely=True)

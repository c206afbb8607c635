"""The architecture, checked: imports go only downwards, and each library has one importer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ema_cli"

# Top to bottom; a module may import only from rows below its own.
ROWS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"cli.diff", "cli.export", "cli.inspect", "cli.map", "cli.rename", "cli.run", "cli.watch"},
    {"cli.verify"},
    {"cli.plan", "cli.stateview"},
    {"cli.planview", "cli.statsview", "cli.options"},
    {"cli.plotfile"},
    {"cli.diffview", "cli.plotview", "cli.timeline"},
    {"cli.command", "cli.completion", "cli.group", "cli.replayed", "cli.shells"},
    {"cli.configuration", "cli.mistakes", "cli.signals"},
    {"views"},
    {"views.out"},
    {"views.screens"},
    {"views.pictures"},
    {"views.heat"},
    {"views.bars", "views.meter", "views.shapes", "views.tables"},
    {"api", "ema"},
    {"api.averaging", "api.checkpoints", "api.following"},
    {"live.watching"},
    {"live.mixing", "live.publishing"},
    {"live.reports"},
    {"continuing"},
    {"exporting", "updating", "verification.auditing"},
    {"states.summary", "states.shadows"},
    {"states.settings", "states.commit"},
    {"states.store", "states.holding"},
    {"states.consistency"},
    {"states.slots", "states.own", "states.binding"},
    {"replaying"},
    {"asked", "running"},
    {"judging"},
    {"producing", "verification.comparing"},
    {"flaws", "executing"},
    {
        "engine",
        "comparison",
        "restoring",
        "renaming",
        "verification.recomputing",
        "verification.summing",
    },
    {"record", "warnings", "reading", "progress", "omitting"},
    {"verifying", "readback", "invocation", "replay", "verification.checking"},
    {"worker"},
    {"measuring"},
    {"tasks"},
    {"plan", "output", "verification.claims"},
    {"work", "announcing", "destination"},
    {"coverage", "copies"},
    {"ranges"},
    {"gathering", "layout"},
    {"regions"},
    {"selection", "live.readiness"},
    {"runs", "live.pinning"},
    {"search"},
    {"states.records", "states.directory"},
    {"provenance", "steps", "states.skeleton", "live.listing"},
    {"spilling", "states.kept", "states.locks", "states.sealed"},
    {"formats"},
    {"formats.detection"},
    {"formats.folders", "formats.foreign"},
    {"formats.sharded", "formats.tensorflow", "formats.torch", "formats.hdf5"},
    {"formats.torch.drafting", "formats.hdf5.archive"},
    {"formats.torch.reading", "formats.torch.rewriting", "formats.hdf5.drafting"},
    {"formats.torch.archive", "formats.torch.legacy", "formats.hdf5.reading"},
    {"formats.torch.machine", "formats.torch.storing", "formats.hdf5.child"},
    {"formats.torch.encoding", "formats.torch.indexing", "formats.torch.opcodes"},
    {f"formats.torch.{name}" for name in ("data", "literals", "models", "plain", "rebuild")},
    {"formats.torch.policy", "formats.torch.state", "formats.torch.survey"},
    {"formats.torch.nodes"},
    {"formats.hdf5.building"},
    {f"formats.hdf5.{name}" for name in ("boxes", "listing", "keras", "spilling")},
    {f"formats.hdf5.{name}" for name in ("isolation", "library", "structure")},
    {f"formats.hdf5.{name}" for name in ("config", "messages", "names", "sandbox", "windows")},
    {"formats.npz"},
    {"formats.zips", "formats.npy"},
    {"formats.zipdirectory"},
    {"formats.safetensors", "formats.tensorflow.drafting", "formats.sidefiles", "formats.zipping"},
    {"formats.tensorflow.bundle"},
    {"formats.tensorflow.roles", "formats.tensorflow.opaque"},
    {"formats.tensorflow.graphs"},
    {"formats.tensorflow.places"},
    {
        f"formats.tensorflow.{name}"
        for name in ("metagraph", "nodes", "objectgraph", "table", "entries")
    },
    {f"formats.tensorflow.{name}" for name in ("spans", "trackable", "block", "shapes")},
    {f"formats.tensorflow.{name}" for name in ("strings", "statefile", "snappy", "ordered")},
    {"formats.tensorflow.wire"},
    {"formats.scanning", "formats.known", "chunks"},
    {"specs", "files", "durable", "kernel", "likeness", "checksums", "outliers"},
    {"schedules", "naming", "blueprint", "distances", "grouping"},
    {"tensors", "machine", "averages"},
    {"errors", "hints"},
    {"interruption", "text", "version", "states", "live", "verification"},
]
RANK = {name: -row for row, names in enumerate(ROWS) for name in names}

# The package itself names its public modules as strings and imports them on first use.
LAZY = {"__init__"}

IMPORTERS = {
    "click": "cli",
    "rich": "views",
    "safetensors": "formats.safetensors",
    "fastcrc": "checksums",
    "ml_dtypes": "tensors",
    "h5py": "formats.hdf5.library",
}


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name inside it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Return the dotted names a module imports, type-checking imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def inside(name: str) -> str | None:
    """Return the module of the package that a dotted name belongs to, or None."""
    parts = name.split(".")
    if parts[0] != "ema_cli":
        return None
    known = modules()
    for end in range(len(parts), 1, -1):
        if (candidate := ".".join(parts[1:end])) in known:
            return candidate
    return None


@pytest.mark.parametrize("name", [n for n in modules() if n not in LAZY])
def test_imports_go_downwards(name: str) -> None:
    """A module imports only from lower rows."""
    assert name in RANK, f"{name} has no row: give it one"
    for target in {inside(imported_name) for imported_name in imported(modules()[name])} - {None}:
        if target != name:
            assert RANK[target] < RANK[name], f"{name} may not import {target}"


def test_rows_name_real_modules() -> None:
    """The table holds nothing that has gone."""
    assert set(RANK) == set(modules()) - LAZY


@pytest.mark.parametrize("library", IMPORTERS)
def test_one_importer_per_library(library: str) -> None:
    """Each third-party package is imported in one place."""
    users = {
        name.split(".")[0] if library in ("click", "rich") else name
        for name, path in modules().items()
        if any(i.split(".")[0] == library for i in imported(path))
    }
    assert users == {IMPORTERS[library]}


@pytest.mark.parametrize("name", modules())
def test_files_stay_short(name: str) -> None:
    """No module is longer than 450 lines."""
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= 450


def test_nothing_is_unpickled_or_executed() -> None:
    """No module can run what a file says."""
    forbidden = {"pickle", "marshal", "shelve", "subprocess", "runpy"}
    # The HDF5 library runs in a process of its own, which is this very interpreter.
    allowed = {"formats.hdf5.isolation": {"subprocess"}}
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {i.split(".")[0] for i in imported(path)} & forbidden
        assert found == allowed.get(name, set()), name
        calls = {
            n.func.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, name

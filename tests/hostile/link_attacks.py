"""Attacks 87-91 on HDF5 files: links, storage elsewhere, endless walks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
from attacks import READ, STEM, canary
from hdf5_making import H5, SOUND, VARS, File, W, of_file, secret

# ---------------------------------------------------------------------------- 87-91: elsewhere


def _external(name: str, inside: str) -> Callable[[File, Path], None]:
    def fill(file: File, folder: Path) -> None:
        file[name] = h5py.ExternalLink(str(secret(folder)), inside)

    return fill


def _in_place(link: Any, name: str = f"{VARS}/1") -> Callable[[File, Path], None]:
    """Put a link where a dataset was."""

    def fill(file: File, folder: Path) -> None:
        del file[name]
        file[name] = link(folder) if callable(link) else link

    return fill


LINKS = (
    of_file(
        "an external link", 87, "a group of another file", _external("layers/more", "/"), "link"
    ),
    of_file(
        "an external link to data",
        87,
        "a dataset of another file",
        _external(f"{VARS}/2", "/secret"),
        "link",
    ),
    of_file(
        "an external link at the root",
        87,
        "a dataset of another file",
        _external("secret", "/secret"),
        "link",
    ),
    of_file(
        "an external link in the middle",
        87,
        "a path whose second part lies in another file",
        _in_place(lambda folder: h5py.ExternalLink(str(secret(folder)), "/dense"), "layers/dense"),
        "link",
    ),
    of_file(
        "an external link instead of data",
        87,
        "a variable of another file",
        _in_place(lambda folder: h5py.ExternalLink(str(secret(folder)), "/secret")),
        "link",
    ),
    of_file(
        "an external link to nothing",
        87,
        "a file that is not there",
        _in_place(h5py.ExternalLink("gone.h5", "/x")),
        "link",
    ),
    of_file(
        "an external link to itself",
        87,
        "the same file, by name",
        _in_place(h5py.ExternalLink(f"{STEM}{H5}", f"/{VARS}/0")),
        "link",
    ),
    of_file(
        "a soft link",
        90,
        "another name of a dataset",
        _in_place(h5py.SoftLink(f"/{VARS}/0")),
        "link",
    ),
    of_file(
        "a dangling soft link", 90, "a name of nothing", _in_place(h5py.SoftLink("/gone")), "link"
    ),
    of_file("a soft link to itself", 90, "a loop", _in_place(h5py.SoftLink(f"/{VARS}/1")), "link"),
    of_file(
        "a soft link to a group",
        90,
        "another name of a group",
        _in_place(h5py.SoftLink("/"), "layers/dense"),
        "link",
    ),
    of_file(
        "a soft link of 60 KB",
        90,
        "a name without end",
        _in_place(h5py.SoftLink("/a" * 30_000)),
        "link",
    ),
)


def _stored_in(*pieces: tuple[str, int, int], size: int = 4) -> Callable[[File, Path], None]:
    """A dataset whose bytes lie in other files."""

    def fill(file: File, folder: Path) -> None:
        places = [(name.replace("CANARY", str(canary(folder))), at, n) for name, at, n in pieces]
        del file[f"{VARS}/1"]
        file.create_dataset(f"{VARS}/1", (size,), "<f4", external=places)

    return fill


def _virtual(source: str, inside: str, count: int = 1) -> Callable[[File, Path], None]:
    """A dataset that is put together from others."""

    def fill(file: File, folder: Path) -> None:
        layout = h5py.VirtualLayout((count * 4,), "<f4")
        for k in range(count):
            name = source.replace("CANARY", str(canary(folder)))
            layout[k * 4 : k * 4 + 4] = h5py.VirtualSource(name, inside, (4,))
        del file[f"{VARS}/1"]
        file.create_virtual_dataset(f"{VARS}/1", layout)

    return fill


ELSEWHERE = (
    of_file("external storage", 88, "bytes of any file", _stored_in(("CANARY/secret.bin", 0, 16))),
    of_file(
        "external storage of /etc", 88, "bytes of any file", _stored_in(("/etc/hostname", 0, 16))
    ),
    of_file(
        "external storage of nothing",
        88,
        "a file that is not there",
        _stored_in(("gone.bin", 0, 16)),
    ),
    of_file(
        "external storage in pieces",
        88,
        "bytes of two files",
        _stored_in(("CANARY/secret.bin", 0, 8), ("CANARY/secret.h5", 0, 8)),
    ),
    of_file(
        "external storage of itself",
        88,
        "bytes of the same file",
        _stored_in((f"{STEM}{H5}", 0, 16)),
    ),
    of_file(
        "external storage of a device", 88, "bytes without end", _stored_in(("/dev/zero", 0, 16))
    ),
    of_file(
        "a virtual dataset", 89, "values of another file", _virtual("CANARY/secret.h5", "secret")
    ),
    of_file(
        "a virtual dataset of nothing",
        89,
        "a source that is not there: zeros, silently",
        _virtual("gone.h5", "x"),
    ),
    of_file(
        "a virtual dataset of itself", 89, "values of the same file", _virtual(".", f"{VARS}/1")
    ),
    of_file(
        "a virtual dataset of 3,000",
        89,
        "sources without end",
        _virtual("CANARY/secret.h5", "secret", 3000),
    ),
)


def _cycle(file: File, _: Path) -> None:
    file["layers/dense/back"] = file["/"]


def _alias(file: File, _: Path) -> None:
    file["layers/tied/vars/0"] = file[f"{VARS}/0"]


def _laughs(file: File, _: Path) -> None:
    """40 groups, each of which holds the next one twice."""
    last = file.create_group("deep0")
    for k in range(1, 40):
        group = file.create_group(f"deep{k}")
        group["a"] = group["b"] = last
        last = group


def _deep(depth: int) -> Callable[[File, Path], None]:
    def fill(file: File, _: Path) -> None:
        group = file.create_group("deep")
        for _level in range(depth):
            group = group.create_group("g")
        group["0"] = W

    return fill


def _wide(file: File, _: Path) -> None:
    """A group of 5,000 groups."""
    group = file.create_group("wide")
    for k in range(5_000):
        group.create_group(str(k))


WALKS = (
    of_file("a group that holds the root", 91, "a path without end", _cycle, "shared"),
    of_file(
        "two names of one dataset",
        91,
        "a tied weight: read all the same",
        _alias,
        ends=READ,
        values={**SOUND, "layers/tied/vars/0": W},
    ),
    of_file("40 groups of two groups", 91, "2^40 paths to nothing", _laughs, "shared"),
    of_file("5,000 groups deep", 91, "depth", _deep(5000)),
    of_file("5,000 empty groups", 91, "groups without end", _wide, ends=READ, libver="latest"),
)

LINK_ATTACKS = (*LINKS, *ELSEWHERE, *WALKS)

"""Drafts of PyTorch files: copies with other storages, and new state_dicts."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_files import (
    GOLDENS,
    archive_of,
    members_of,
    read,
    ref,
    saved,
    state_of,
    values,
    written,
)

from ema_cli.blueprint import AVERAGE, COPY, LOCAL_STEP, Draft, Entry, entry_of
from ema_cli.errors import InputChanged, UnsupportedInput
from ema_cli.formats import torch
from ema_cli.formats.torch.encoding import encode
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Ordered
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Role, Tensor

# What stands for torch's hash of a file, and its checksums: the last member.
ID = b"archive/.data/serialization_id"
ASIDE = (Role.OPTIMIZER, Role.BESIDE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def model_of(checkpoint: Checkpoint) -> list[Tensor]:
    index = checkpoint.index
    return [t for t in index.tensors if index.roles.get(t.name) not in ASIDE]


def copies(tensors: Sequence[Tensor]) -> list[Entry]:
    return [entry_of(t.name, t, COPY) for t in tensors]


def fresh(checkpoint: Checkpoint, entries: Sequence[Entry] | None = None) -> Draft:
    wanted = copies(model_of(checkpoint)) if entries is None else entries
    return torch.fresh(wanted, checkpoint, None)


def copied(draft: Draft, last: Checkpoint, content: bytes) -> bytes:
    """Return the file of a draft, with the values of the last checkpoint."""
    by_name = last.index.by_name
    return written(draft, last, {name: values(content, by_name[name]) for name in draft.places})


def pickled(content: bytes, path: Path) -> Any:
    """Return what the pickle of an archive says."""
    return load(members_of(content, path)["data.pkl"], "out", "data.pkl")[0]


# ---------------------------------------------------------------------------- new files


def test_a_state_dict_has_the_bytes_that_torch_gives_it(path: Path) -> None:
    """In the order of the state_dict; all but the id, which nobody can compute."""
    golden = GOLDENS["state"]
    last = read(path, golden.content)
    entries = copies([last.index.by_name[name] for name in golden.tensors])
    made = copied(fresh(last, entries), last, golden.content)
    assert len(made) == len(golden.content)
    ours, theirs = bytearray(made), bytearray(golden.content)
    for content in (ours, theirs):
        crc = zlib.crc32(members_of(bytes(content), path)[".data/serialization_id"])
        start = content.index(b"Z", content.index(ID) + len(ID))
        data = start + next(k for k, byte in enumerate(content[start:]) if byte != ord("Z"))
        content[data : data + 40] = bytes(40)
        while (at := content.find(crc.to_bytes(4, "little"), data)) >= 0:
            content[at : at + 4] = bytes(4)
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "negative"])
def test_a_new_file_holds_the_model(name: str, path: Path) -> None:
    content, expected = GOLDENS[name]
    last = read(path, content)
    draft = fresh(last)
    made = copied(draft, last, content)
    again = read(path, made)
    assert again.index.by_name == draft.places
    found = {t.name: (t.dtype.name, t.shape, values(made, t)) for t in again.index.tensors}
    assert found == expected
    assert zipfile.ZipFile(path).testzip() is None
    assert again.checksums is not None


def test_storages_are_numbered_as_they_are_mentioned(path: Path) -> None:
    """Or torch.load would not find them where it computes that they are."""
    content = GOLDENS["tensors"].content
    last = read(path, content)
    draft = fresh(last)
    made = copied(draft, last, content)
    members = list(members_of(made, path))
    keys = [name for name in members if name.startswith("data/")]
    assert keys == [f"data/{k}" for k in range(len(keys))]
    assert members == [
        "data.pkl",
        ".format_version",
        ".storage_alignment",
        "byteorder",
        *keys,
        "version",
        ".data/serialization_id",
    ]
    mentioned = [t.storage.key for t in pickled(made, path).values()]
    assert list(dict.fromkeys(mentioned)) == [str(k) for k in range(len(keys))]
    assert all(e.offset % 64 == 0 for e in draft_extents(draft))


def draft_extents(draft: Draft) -> list[Extent]:
    return [tensor.extent for tensor in draft.places.values()]


def test_ties_share_a_storage_and_other_views_do_not(path: Path) -> None:
    last = read(path, GOLDENS["tensors"].content)
    places = fresh(last).places
    assert places["base"].extent == places["transposed"].extent
    assert places["transposed"].strides == (1, 10)
    assert places["column"].extent.nbytes == 24
    assert places["column"].strides == ()
    assert places["row"].extent != places["base"].extent
    assert places["expanded"].extent.nbytes == 12
    assert places["expanded"].strides == (1, 0)
    assert places["channels_last"].strides == (0, 1, 8, 2)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ((COPY, "float32"), (COPY, "float32"), True),
        ((AVERAGE, "float32"), (AVERAGE, "float32"), True),
        ((AVERAGE, "float32"), (COPY, "float32"), False),
        ((AVERAGE, "float32"), (AVERAGE, "float64"), False),
        ((AVERAGE, "float64"), (AVERAGE, "float64"), True),
    ],
)
def test_a_tie_is_of_equal_parts_and_dtypes(
    first: tuple[str, str], second: tuple[str, str], shared: bool, path: Path
) -> None:
    last = read(path, saved(state_of(a=ref(), b=ref())))
    by_name = last.index.by_name
    entries = [
        entry_of(name, by_name[name], part, DTYPES[dtype])
        for name, (part, dtype) in (("a", first), ("b", second))
    ]
    places = fresh(last, entries).places
    assert (places["a"].extent == places["b"].extent) is shared
    assert places["a"].extent.nbytes == 6 * DTYPES[first[1]].bits // 8


def test_equal_bytes_that_are_gathered_differently_are_no_tie(path: Path) -> None:
    same = {"offset": 0, "numel": 12}
    root = state_of(
        a=ref(shape=(2, 2), strides=(6, 4), **same),
        b=ref(shape=(2, 2), strides=(4, 6), **same),
        c=ref(shape=(2, 2), strides=(6, 4), **same),
        d=ref(shape=(11,), **same),
    )
    places = fresh(read(path, saved(root))).places
    assert places["a"].extent == places["c"].extent
    assert len({places[name].extent for name in "abd"}) == 3


def test_a_local_step_is_a_scalar(path: Path) -> None:
    last = read(path, saved(state_of(w=ref(shape=(2, 2), strides=(1, 2)))))
    w = last.index.by_name["w"]
    entries = [
        entry_of("w/ema", w, AVERAGE),
        Entry("w/ema/local_step", w.dtype, (), LOCAL_STEP, "w"),
    ]
    places = fresh(last, entries).places
    assert places["w/ema"].strides == (1, 2)
    assert places["w/ema/local_step"][2:4] == ((), places["w/ema/local_step"].extent)
    assert places["w/ema/local_step"].extent.nbytes == 4


def test_tensors_without_elements_have_storages_of_their_own(path: Path) -> None:
    last = read(path, saved(state_of(a=ref(shape=(0, 3)), b=ref(shape=(0, 3)), c=ref("1"))))
    draft = fresh(last)
    assert len({extent.offset for extent in draft_extents(draft)}) == 3
    assert draft.sums == (draft.places["c"].extent,)
    content = copied(draft, last, path.read_bytes())
    assert read(path, content).index.by_name == draft.places


@pytest.mark.parametrize("name", ["state", "training", "unchecked"])
def test_metadata_of_the_model_stays_while_its_names_do(name: str, path: Path) -> None:
    content = GOLDENS[name].content
    last = read(path, content)
    metadata = pickled(copied(fresh(last), last, content), path).attributes["_metadata"]
    assert metadata["norm"] == {"version": 2}
    renamed = [e._replace(name=f"new.{e.name}") for e in copies(model_of(last))]
    by_name = last.index.by_name
    made = written(
        fresh(last, renamed),
        last,
        {e.name: values(content, by_name[e.source]) for e in renamed},
    )
    assert pickled(made, path).attributes == {}


def test_metadata_that_is_no_plain_data_is_left_out(path: Path) -> None:
    for metadata in (ref("1"), {"a": [ref("1")]}):
        root = state_of(w=ref())
        root.attributes["_metadata"] = metadata
        content = saved(root, **{"data/1": bytes(24)})
        last = read(path, content)
        assert pickled(copied(fresh(last), last, content), path).attributes == {}


def test_big_endian_stays_so(path: Path) -> None:
    members = {"data.pkl": encode(state_of(w=ref())), "byteorder": b"big", "data/0": bytes(24)}
    content = archive_of(members)
    last = read(path, content)
    made = copied(fresh(last), last, content)
    assert members_of(made, path)["byteorder"] == b"big"
    other = read(path, saved(state_of(w=ref())))
    assert members_of(copied(fresh(other), other, content), path)["byteorder"] == b"little"


def test_drafts_are_the_same_each_time(path: Path) -> None:
    last = read(path, GOLDENS["training"].content)
    assert fresh(last) == fresh(last)
    assert torch.template(last, model_of(last), "drop") == torch.template(
        last, model_of(last), "drop"
    )


def test_what_torch_can_hold() -> None:
    expected = {name for name, (dtype, _, _) in GOLDENS["tensors"].tensors.items() if name == dtype}
    assert {name for name in DTYPES if torch.representable(DTYPES[name])} == expected
    assert torch.can_name("a/b.c é\n")
    assert not torch.can_name("")
    assert not torch.can_name("\udc80")


# ---------------------------------------------------------------------------- copies


def test_a_copy_keeps_all_but_the_storages_and_their_checksums(path: Path) -> None:
    content = GOLDENS["state"].content
    last = read(path, content)
    averaged = [last.index.by_name[name] for name in ("first.weight", "norm.weight")]
    draft = torch.template(last, averaged, "refuse")
    assert draft is not None
    assert (draft.files[0].copy_of, draft.files[0].nbytes) == (str(path), len(content))
    assert set(draft.sums) == {tensor.extent for tensor in averaged}
    assert draft.places is last.index.by_name
    made = written(draft, last, {t.name: bytes(t.extent.nbytes) for t in averaged})
    places = {
        place
        for e in draft.sums
        for at in (e.offset, *draft.own[e])  # type: ignore[index]
        for place in range(at, at + (e.nbytes if at == e.offset else 4))
    }
    changed = {k for k in range(len(content)) if made[k] != content[k]}
    assert changed <= places
    again = read(path, made)
    assert again.index.by_name == last.index.by_name
    assert zipfile.ZipFile(path).testzip() is None


def test_the_whole_storage_of_an_averaged_view_is_summed(path: Path) -> None:
    last = read(path, GOLDENS["tensors"].content)
    by_name = last.index.by_name
    draft = torch.template(last, [by_name["column"], by_name["row"], by_name["empty"]], "refuse")
    assert draft is not None
    assert draft.sums == (by_name["base"].extent,)


def test_a_file_without_checksums_keeps_none(path: Path) -> None:
    last = read(path, GOLDENS["unchecked"].content)
    draft = torch.template(last, model_of(last), "refuse")
    assert draft is not None
    assert draft.sums == ()
    made = written(draft, last, {"first.weight": np.ones(9, "<f4").tobytes()})
    assert read(path, made).checksums is None


def test_a_stream_is_not_copied(path: Path) -> None:
    last = read(path, GOLDENS["stream"].content)
    assert torch.template(last, model_of(last), "refuse") is None


def test_a_file_that_changed_since_is_noticed(path: Path) -> None:
    last = read(path, GOLDENS["state"].content)
    path.write_bytes(GOLDENS["training"].content)
    with pytest.raises(InputChanged):
        torch.template(last, model_of(last), "refuse")
    with pytest.raises(InputChanged):
        fresh(last)


# ---------------------------------------------------------------------------- unknown objects


def test_unknown_objects_are_refused_with_names_and_places(path: Path) -> None:
    last = read(path, GOLDENS["training"].content)
    with pytest.raises(UnsupportedInput) as caught:
        torch.template(last, model_of(last), "refuse")
    assert caught.value.message == (
        f"{path}: its pickle calls names that are neither PyTorch's nor known plain data: "
        "__main__.Thing (at thing)"
    )
    assert "--unknown drop" in caught.value.hint
    assert "--unknown keep" in caught.value.hint


def test_unknown_objects_are_kept_when_asked_for(path: Path) -> None:
    content = GOLDENS["training"].content
    last = read(path, content)
    draft = torch.template(last, model_of(last), "keep")
    assert draft is not None
    assert written(draft, last, {}) == content
    (note,) = draft.notes
    assert note == (
        "loads with weights_only=False only, as its input does: it holds __main__.Thing, "
        "argparse.Namespace"
    )


def test_unknown_objects_are_dropped_when_asked_for(path: Path) -> None:
    content = GOLDENS["training"].content
    last = read(path, content)
    draft = torch.template(last, model_of(last), "drop")
    assert draft is not None
    assert draft.notes == ("left out, since it is no plain data: args, thing",)
    assert last.index.by_name.keys() - draft.places.keys() == {"thing/inside"}
    made = copied(draft, last, content)
    root = pickled(made, path)
    assert list(root) == ["epoch", "model", "optimizer", "best", "num_updates"]
    assert (root["epoch"], root["best"][1]) == (3, {"step": 7})
    assert type(root["model"]) is Ordered
    assert root["model"].attributes["_metadata"]["norm"] == {"version": 2}
    again = read(path, made)
    assert again.index.by_name == draft.places
    for name, tensor in again.index.by_name.items():
        assert values(made, tensor) == values(content, last.index.by_name[name])


def test_a_dropped_module_leaves_its_state(path: Path) -> None:
    content, expected = GOLDENS["module"]
    last = read(path, content)
    draft = torch.template(last, model_of(last), "drop")
    assert draft is not None
    assert draft.notes == ("holds the state_dict of the model, where its input holds an object",)
    made = copied(draft, last, content)
    again = read(path, made)
    found = {
        name: (t.dtype.name, t.shape, values(made, t)) for name, t in again.index.by_name.items()
    }
    assert found == expected
    assert draft.places["first.weight"].extent == draft.places["again.weight"].extent


def test_an_averaged_tensor_is_never_dropped(path: Path) -> None:
    last = read(path, GOLDENS["training"].content)
    averaged = [*model_of(last), last.index.by_name["thing/inside"]]
    with pytest.raises(UnsupportedInput, match="hidden among objects"):
        torch.template(last, averaged, "drop")

"""Hugging Face folders: one safetensors file, or shards with a ``*.safetensors.index.json``.

The index is ``{"metadata": {"total_size": bytes}, "weight_map": {tensor: shard file}}``. Shards
may be symbolic links, as they are in hub caches; their names must be bare file names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ema_cli.blueprint import Draft, Entry, File
from ema_cli.errors import DamagedFile, InputError, UnsupportedInput
from ema_cli.files import read_small
from ema_cli.formats import safetensors
from ema_cli.formats.known import Known
from ema_cli.formats.scanning import Repeated, unique
from ema_cli.tensors import Checkpoint, Extent, Index, Stamp, Tensor
from ema_cli.text import shorten

NAME = "safetensors-folder"
INDEX_SUFFIX = ".safetensors.index.json"
DEFAULT_STEM = "model"
DEFAULT_SHARD_SIZE = 5 * 10**9

INDEX_LIMIT = 64 << 20
# What a folder needs to load besides its weights, copied when it is this small.
SIDE_FILE_LIMIT = 64 << 20
_SIDE_NAMES = {
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
}
_SIDE_STARTS = ("config", "tokenizer")
_SIDE_ENDS = (".jinja", ".py")


def contents(folder: str) -> tuple[list[str], list[str]]:
    """Return the (index files, weights files) of `folder`, each sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{shorten(folder, 1000)}: cannot list: {reason}") from error
    visible = [name for name in names if not name.startswith(".")]
    indexes = [name for name in visible if name.endswith(INDEX_SUFFIX)]
    return indexes, [name for name in visible if name.endswith(safetensors.SUFFIX)]


def is_checkpoint(folder: str) -> bool:
    """Whether `folder` has an index or exactly one weights file."""
    indexes, weights = contents(folder)
    return bool(indexes) or len(weights) == 1


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint in a folder, or behind an index file given by its own path."""
    if path.endswith(INDEX_SUFFIX):
        folder, index_name = os.path.split(path)
        return _read_sharded(path, folder, index_name, known)
    indexes, weights = contents(path)
    single = [name for name in weights if name + ".index.json" in indexes]
    if single or (not indexes and len(weights) == 1):
        return _assemble(path, path, [(single or weights)[0]], known)
    if len(indexes) == 1:
        return _read_sharded(path, path, indexes[0], known)
    found = f"{len(indexes)} indexes and {len(weights)} weights files"
    raise InputError(
        f"{shorten(path, 1000)}: expected one index or one weights file, found {found}",
        "name the index file itself" if indexes else "",
    )


def _read_sharded(path: str, folder: str, index_name: str, known: Known) -> Checkpoint:
    index_path = os.path.join(folder, index_name)
    weight_map, total_size = _weight_map(index_path)
    shards = sorted(set(weight_map.values()))
    checkpoint = _assemble(path, folder, shards, known)
    _check_weight_map(index_path, weight_map, checkpoint.index)
    notes: tuple[str, ...] = ()
    if total_size is not None and total_size != checkpoint.index.nbytes:
        notes = (
            f"{shorten(index_path, 1000)}: total_size says {total_size:,} bytes, "
            f"the shards hold {checkpoint.index.nbytes:,}",
        )
    return dataclasses.replace(checkpoint, notes=notes, index_file=index_path)


def _weight_map(path: str) -> tuple[dict[str, str], float | None]:
    document = _json_object(path, INDEX_LIMIT)
    weight_map = document.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise DamagedFile(path, "expected an object 'weight_map' of tensors and shard files")
    for tensor, shard in weight_map.items():
        if type(shard) is not str or not _bare_name(shard):
            raise DamagedFile(
                path,
                f"expected the bare name of a {safetensors.SUFFIX} file, "
                f"found '{shorten(str(shard))}'",
                tensor,
            )
    metadata = document.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return weight_map, total if type(total) in (int, float) else None


def _bare_name(name: str) -> bool:
    """Whether `name` cannot lead out of its folder on any system."""
    return (
        name.endswith(safetensors.SUFFIX)
        and name != safetensors.SUFFIX
        and not set(name) & set("/\\:\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
        and name.isprintable()
    )


def _json_object(path: str, limit: int) -> dict[str, Any]:
    def hook(pairs: list[tuple[str, Any]]) -> Any:
        value = unique(pairs)
        if isinstance(value, Repeated):
            raise DamagedFile(path, f"'{shorten(value.field)}' stands twice in one object")
        return value

    try:
        document = json.loads(read_small(path, limit).decode("utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise DamagedFile(path, "the JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"not UTF-8: byte {error.start}") from None
    except ValueError as error:
        raise DamagedFile(path, f"not JSON: {shorten(str(error))}") from None
    if type(document) is not dict:
        raise DamagedFile(path, "expected a JSON object")
    return document


def _assemble(path: str, folder: str, shards: Sequence[str], known: Known) -> Checkpoint:
    """Return one checkpoint made of the `shards`, whose order gives `Extent.file`."""
    files: list[Stamp] = []
    parts: list[Index] = []
    digests: tuple[str, ...] = ()
    for name in shards:
        part = safetensors.read(os.path.join(folder, name), known)
        files.extend(part.files)
        parts.append(part.index)
        digests += part.digests
    key = (NAME, *shards, *digests, *(str(file.size) for file in files))
    if key not in known:
        known[key] = Index(NAME, _joined(path, parts), tuple(shards), parts[0].metadata)
    return Checkpoint(path, tuple(files), known[key], digests)


def _joined(path: str, parts: Sequence[Index]) -> tuple[Tensor, ...]:
    tensors: dict[str, Tensor] = {}
    for ordinal, part in enumerate(parts):
        for name, dtype, shape, (_, offset, nbytes), _ in part.tensors:
            if name in tensors:
                raise DamagedFile(path, "this tensor is in two shards", name)
            tensors[name] = Tensor(name, dtype, shape, Extent(ordinal, offset, nbytes))
    return tuple(tensors.values())


def _check_weight_map(path: str, weight_map: Mapping[str, str], index: Index) -> None:
    for name, shard in weight_map.items():
        tensor = index.by_name.get(name)
        found = "nowhere" if tensor is None else f"in '{index.names[tensor.extent.file]}'"
        if tensor is None or index.names[tensor.extent.file] != shard:
            raise DamagedFile(path, f"expected it in '{shorten(shard)}', found it {found}", name)


# ---------------------------------------------------------------------------- beside the weights


def side_files(folder: str) -> list[str]:
    """Return the names of the files that make `folder` load, by allow-list, sorted.

    Regular files of at most `SIDE_FILE_LIMIT` bytes; links only into the ``blobs`` folder of a hub
    cache, since any other could bring in a file that is none of the model's.
    """
    found = []
    blobs = os.path.realpath(os.path.join(folder, "..", "..", "blobs"))
    for entry in _entries(folder):
        name = entry.name
        wanted = (
            name in _SIDE_NAMES
            or (name.startswith(_SIDE_STARTS) and name.endswith((".json", ".model")))
            or name.endswith(_SIDE_ENDS)
        )
        own = not entry.is_symlink() or os.path.dirname(os.path.realpath(entry.path)) == blobs
        if wanted and own and entry.is_file() and entry.stat().st_size <= SIDE_FILE_LIMIT:
            found.append(name)
    return sorted(found)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def refuse_quantized(folder: str) -> None:
    """Raise `UnsupportedInput` when the folder's config says that the weights are quantised."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path) or os.path.getsize(path) > INDEX_LIMIT:
        return
    try:
        config = json.loads(read_small(path, INDEX_LIMIT))
    except (ValueError, RecursionError):
        return  # not needed for reading the weights
    if isinstance(config, dict) and config.get("quantization_config"):
        raise UnsupportedInput(
            f"{shorten(path, 1000)}: the weights are quantised (quantization_config), and an "
            "average of quantised numbers is none",
            "dequantise the checkpoints first, then average the result",
        )


# ---------------------------------------------------------------------------- writing


def template(last: Checkpoint) -> Draft:
    """Return the files of `last` with their headers, and its index file, byte for byte."""
    pairs = zip(last.index.names, last.files, strict=True)
    files = [safetensors.template_file(name, stamp) for name, stamp in pairs]
    if last.index_file:
        name = os.path.basename(last.index_file)
        files.append(File(name, os.path.getsize(last.index_file), copy_of=last.index_file))
    return Draft(files + copied_side_files(last), last.index.by_name)


def fresh(entries: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return new shards of at most `limit` bytes with `entries`, and their index."""
    shards = _shards(entries, limit or DEFAULT_SHARD_SIZE)
    names = _shard_names(_stem(last), len(shards))
    files: list[File] = []
    places: dict[str, Tensor] = {}
    for ordinal, (name, shard) in enumerate(zip(names, shards, strict=True)):
        file, placed = safetensors.fresh_file(name, ordinal, shard, last.index.metadata)
        files.append(file)
        places.update(placed)
    if len(files) > 1:
        weight_map = {name: names[tensor.extent.file] for name, tensor in places.items()}
        total = sum(tensor.extent.nbytes for tensor in places.values())
        text = encode_index(weight_map, total)
        files.append(File(_stem(last) + INDEX_SUFFIX, len(text), ((0, text),)))
    return Draft(files + copied_side_files(last), places)


def _stem(last: Checkpoint) -> str:
    """Return ``model`` of ``model-00001-of-00002.safetensors``: loaders look for that name."""
    if last.index.format != NAME:
        return DEFAULT_STEM
    stem = last.index.names[0].removesuffix(safetensors.SUFFIX)
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards of at most `limit` bytes in the order of the input; one tensor may be more."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [stem + safetensors.SUFFIX]
    return [f"{stem}-{k:05}-of-{count:05}{safetensors.SUFFIX}" for k in range(1, count + 1)]


def copied_side_files(last: Checkpoint) -> list[File]:
    """Return the config and tokenizer files that make a Hugging Face folder load."""
    if last.index.format != NAME:
        return []
    folder = last.path if os.path.isdir(last.path) else os.path.dirname(last.path)
    paths = [(name, os.path.join(folder, name)) for name in side_files(folder)]
    return [File(name, os.path.getsize(path), copy_of=path) for name, path in paths]


def encode_index(places: Mapping[str, str], total_size: int) -> bytes:
    """Return the bytes of an index file as transformers writes them: sorted, indented by two."""
    document = {"metadata": {"total_size": total_size}, "weight_map": places}
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    return text.encode("utf-8")

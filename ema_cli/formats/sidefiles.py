"""What makes a Hugging Face folder load beside its weights: configurations, tokenizers, code."""

from __future__ import annotations

import json
import os

from ema_cli.blueprint import File
from ema_cli.errors import UnsupportedInput
from ema_cli.files import read_small
from ema_cli.tensors import Checkpoint
from ema_cli.text import shorten

_CONFIG_LIMIT = 64 << 20
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
    if not os.path.isfile(path) or os.path.getsize(path) > _CONFIG_LIMIT:
        return
    try:
        config = json.loads(read_small(path, _CONFIG_LIMIT))
    except (ValueError, RecursionError):
        return  # not needed for reading the weights
    if isinstance(config, dict) and config.get("quantization_config"):
        raise UnsupportedInput(
            f"{shorten(path, 1000)}: the weights are quantised (quantization_config), and an "
            "average of quantised numbers is none",
            "dequantise the checkpoints first, then average the result",
        )


def copied_side_files(last: Checkpoint) -> list[File]:
    """Return the config and tokenizer files that make the folder of `last` load."""
    folder = last.path if os.path.isdir(last.path) else os.path.dirname(last.path)
    paths = [(name, os.path.join(folder, name)) for name in side_files(folder)]
    return [File(name, os.path.getsize(path), copy_of=path) for name, path in paths]

"""The folders that hold one checkpoint: those of Hugging Face, and any with one file of weights."""

from __future__ import annotations

import os

from ema_cli.formats import hdf5, npz, safetensors, torch
from ema_cli.formats.sharded import Part, Shards
from ema_cli.formats.sidefiles import side_files

# Beside the weights of a training run: none of them holds a model.
COMPANIONS = ("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args")

SAFETENSORS = Shards(
    "safetensors-folder",
    safetensors.SUFFIX,
    "model",
    Part(safetensors.read, safetensors.template, safetensors.fresh),
)
TORCH = Shards(
    "torch-folder",
    ".bin",
    "pytorch_model",
    Part(torch.read, torch.template, torch.fresh, torch.seal),
    COMPANIONS,
)
KINDS = (SAFETENSORS, TORCH)
_SUFFIXES = (*torch.SUFFIXES, *hdf5.SUFFIXES, hdf5.KERAS_SUFFIX, npz.SUFFIX)


def kind_of(path: str) -> Shards | None:
    """Return what a folder, or an index file, is an example of."""
    if os.path.isdir(path):
        return next((kind for kind in KINDS if kind.is_checkpoint(path)), None)
    return next((kind for kind in KINDS if path.endswith(kind.index_suffix)), None)


def weights_in(folder: str) -> list[str]:
    """Return the names of the files in a folder that are weights by their suffix."""
    SAFETENSORS.contents(folder)  # says why it cannot be listed
    suffixes = (*_SUFFIXES, safetensors.SUFFIX)
    return sorted(name for name in os.listdir(folder) if _is_weights(name, suffixes))


def _is_weights(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.endswith(suffixes) and not name.startswith((".", *COMPANIONS))


def only_file(folder: str) -> str | None:
    """Return the path of the one file of weights in a folder that is no Hugging Face's."""
    names = weights_in(folder)
    path = os.path.join(folder, names[0]) if len(names) == 1 else ""
    return path if kind_of(folder) is None and os.path.isfile(path) else None


def is_checkpoint(folder: str) -> bool:
    """Whether a folder has an index of shards, or exactly one file of weights."""
    return kind_of(folder) is not None or only_file(folder) is not None


def own_files(folder: str) -> set[str]:
    """Return the names in a folder that belong to a checkpoint."""
    listed = (name for kind in KINDS for names in kind.contents(folder) for name in names)
    return {*listed, *side_files(folder)}

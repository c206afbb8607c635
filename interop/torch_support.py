"""What the tests of PyTorch files share: loading in every way there is, and comparing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import torch
from support import FIXTURES, Array, differences
from torch.utils.serialization import config

TORCH = FIXTURES / "torch"
sys.path.append(str(TORCH))  # the classes of the networks

State = dict[str, torch.Tensor]


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return the same numbers as an array of its own; those of 8 bits as bytes."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8).numpy().copy()
    return tensor.numpy().copy()


def arrays(state: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Return the values of a state_dict."""
    return {name: to_numpy(tensor) for name, tensor in state.items()}


def tensors(value: Any, path: str = "") -> State:
    """Return the tensors in nested containers by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inside = {
        f"{path}/{name}": one
        for name, one in items
        if isinstance(one, torch.Tensor | torch.nn.Module | dict | list | tuple)
    }
    return {name: t for inner, one in inside.items() for name, t in tensors(one, inner).items()}


def plain(value: Any) -> Any:
    """Return nested containers with each tensor replaced by its dtype, shape and strides."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.stride())
    if isinstance(value, torch.nn.Module):
        return plain(value.state_dict())
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def load(path: Path, **options: Any) -> Any:
    """Load a file in all the ways that PyTorch has, which find the same; safely if not told."""
    options = {"weights_only": True, **options}
    loaded = torch.load(path, **options)
    for more in ({"mmap": False}, {"mmap": True}, {"map_location": "meta"}):
        for calculated in (False, True):
            config.load.calculate_storage_offsets = calculated
            try:
                again = torch.load(path, **more, **options)
            finally:
                config.load.calculate_storage_offsets = False
            assert plain(again) == plain(loaded)
            if "mmap" in more:
                assert differences(arrays(tensors(again)), arrays(tensors(loaded))) == []
    return loaded

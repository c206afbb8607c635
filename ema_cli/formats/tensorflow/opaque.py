"""Checksums of tensors of variable width: strings and variants, carried verbatim, never parsed."""

from __future__ import annotations

from ema_cli.errors import DamagedFile
from ema_cli.formats.tensorflow import places, strings
from ema_cli.formats.tensorflow.wire import Malformed
from ema_cli.tensors import Checkpoint, Tensor


def opaque_checksums(checkpoint: Checkpoint, tensor: Tensor) -> tuple[int, int]:
    """Return the CRC-32C of the stored bytes, and the one the index must hold for them."""
    file, offset, n_bytes = tensor.extent
    path = checkpoint.files[file].path
    check = strings.string_checksums
    if tensor.dtype.name == "variant":
        check = strings.variant_checksums
    with places.reading(path) as read:
        try:
            return check(
                lambda start, count: read(offset + start, count),
                n_bytes,
                tensor.elements,
                big_endian=checkpoint.index.big_endian,
            )
        except Malformed as error:
            raise DamagedFile(path, str(error), tensor.name) from None

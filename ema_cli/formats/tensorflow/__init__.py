"""TensorFlow checkpoints (TensorBundle): a table of entries beside files of raw bytes.

``PREFIX.index`` is a sorted table (`table`) whose entries (`entries`) tell dtype, shape, place and
checksum of each tensor in ``PREFIX.data-?????-of-?????``. Source: tensor_bundle.proto and
tensor_bundle.cc of TensorFlow.
"""

from ema_cli.formats.tensorflow.bundle import read
from ema_cli.formats.tensorflow.drafting import (
    can_name,
    fresh,
    renamed,
    representable,
    seal,
    template,
    template_known_as,
)
from ema_cli.formats.tensorflow.opaque import opaque_checksums
from ema_cli.formats.tensorflow.places import (
    IN_SAVED_MODEL,
    META_SUFFIX,
    NAME,
    STATE_FILE,
    STEM,
    SUFFIX,
    V1,
    files_of,
    is_v1,
    prefix_in,
    prefix_of,
    prefixes,
    saved_model_in,
    state_in,
    stem_of,
    v1_refusal,
)

__all__ = [
    "IN_SAVED_MODEL",
    "META_SUFFIX",
    "NAME",
    "STATE_FILE",
    "STEM",
    "SUFFIX",
    "V1",
    "can_name",
    "files_of",
    "fresh",
    "is_v1",
    "opaque_checksums",
    "prefix_in",
    "prefix_of",
    "prefixes",
    "read",
    "renamed",
    "representable",
    "saved_model_in",
    "seal",
    "state_in",
    "stem_of",
    "template",
    "template_known_as",
    "v1_refusal",
]

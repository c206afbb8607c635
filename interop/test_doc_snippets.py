"""The blocks of the documents that need PyTorch, TensorFlow or Keras, executed with them.

The convention stands in tests/documents.py. All other blocks of such a document are executed too,
since these need what they wrote.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import DOCUMENTS, check, examples, prepare

NEEDING = [
    document
    for document in DOCUMENTS
    if any(example.framework for example in examples(document.read_text(encoding="utf-8")))
]


def test_there_are_some() -> None:
    """PyTorch's update of batch-norm statistics is shown at least."""
    assert "batchnorm.md" in {document.name for document in NEEDING}


@pytest.mark.parametrize("document", NEEDING, ids=lambda path: path.name)
def test_every_block_does_what_the_document_shows(document: Path, tmp_path: Path) -> None:
    """Run in order, with the frameworks at hand."""
    prepare(tmp_path)
    for example in examples(document.read_text(encoding="utf-8")):
        check(example, tmp_path)

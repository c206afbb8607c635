"""Thousands of mutated files of each format: refused by our errors, or read; never anything else.

Every mutant is read to its last byte, in processes whose memory is limited. The long run reads
more of them: ``EMA_AVG_MUTANTS=1000000 pytest tests/hostile/test_mutated_files.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mutating import KINDS

MUTANTS = int(os.environ.get("EMA_AVG_MUTANTS", "5000"))
ENOUGH = 60 + MUTANTS  # seconds
LIMIT = 300 << 10  # KiB

Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Told]]:
    """What the mutants of each kind came to; all kinds are read at once."""
    program = Path(__file__).parent / "mutating.py"
    started = {
        kind: subprocess.Popen(
            [sys.executable, program, kind, "0", str(MUTANTS)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        for kind in KINDS
    }
    try:
        outputs = {
            kind: process.communicate(timeout=ENOUGH)[0] for kind, process in started.items()
        }
    finally:
        for process in started.values():
            process.kill()
    yield {kind: [json.loads(line) for line in out.splitlines()] for kind, out in outputs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_raise_only_our_errors(kind: str, told: dict[str, Told]) -> None:
    """No other exception, no hang, no crash; what checksums cover is never read changed."""
    *surprises, end = told[kind]
    assert surprises == []
    counts = end["counts"]
    assert sum(counts.values()) == MUTANTS
    # A test that refuses everything would prove nothing, nor would one that reads everything.
    assert counts["refused"] > MUTANTS / 10
    assert counts["same"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_take_no_memory(kind: str, told: dict[str, Told]) -> None:
    """What a length says is never allocated."""
    end = told[kind][-1]
    assert max(end["peak"], end["helper"]) < LIMIT

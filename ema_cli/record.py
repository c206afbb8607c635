"""A plan as JSON data: what ``plan --json`` prints and what provenance files keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ema_cli import machine, provenance, replay
from ema_cli.plan import Outcome, Plan
from ema_cli.runs import Run
from ema_cli.schedules import effective_count, mean_age
from ema_cli.search import PassedOver


def describe(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Return one average of a plan: inputs, schedule, tensors, output; no checksums yet."""
    average, layout = outcome.average, outcome.layout
    return {
        "schema": provenance.SCHEMA,
        "tool": machine.versions(),
        "average": {
            "label": average.label,
            "spec": average.spec,
            "num_updates": average.num_updates,
            "init": average.init,
            "zero_debias": average.zero_debias,
            "shadow_dtype": plan.request.shadow_dtype,
            "like": plan.request.like,
            "non_finite": plan.request.non_finite,
            "effective_checkpoints": effective_count(outcome.weights),
            "mean_age_steps": mean_age(outcome.weights, plan.run.steps),
            "weight_sum": sum(outcome.weights),
        },
        "request": replay.recorded(plan.request, average),
        "inputs": _inputs(plan, outcome),
        "averaged": [tensor.name for tensor in outcome.selection.averaged],
        "copied": [{"tensor": name, "reason": reason} for name, reason in copied(outcome)],
        "left_out": [{"tensor": name, "reason": reason} for name, reason in layout.left_out],
        "output": {
            "path": layout.path,
            "format": layout.format,
            "step": outcome.last.step,
            "layout": "template" if layout.template else "fresh",
            "names": layout.names,
            "name": plan.request.wishes.name,
            "files": [{"name": file.name, "bytes": file.nbytes} for file in layout.files],
        },
    }


def passed_over(run: Run) -> list[dict[str, Any]]:
    """Return the entries of a run that were not taken, each with its reason."""
    return entries(run.passed_over)


def entries(found: Sequence[PassedOver]) -> list[dict[str, Any]]:
    """Return entries that were not taken, each with its reason."""
    return [
        {"path": entry.path, "reason": entry.reason, "unusable": entry.unusable} for entry in found
    ]


def copied(outcome: Outcome) -> list[tuple[str, str]]:
    """Return the tensors an output copies from its last checkpoint, each with the reason."""
    left_out = {name for name, _ in outcome.layout.left_out}
    rows = [(choice.tensor.name, choice.reason) for choice in outcome.selection.copied]
    rows += [(t.name, "optimizer state") for t in outcome.selection.optimizer]
    rows += [(t.name, "beside the model") for t in outcome.selection.beside]
    return [row for row in rows if row[0] not in left_out]


def _inputs(plan: Plan, outcome: Outcome) -> list[dict[str, Any]]:
    coefficients = plan.schedules[outcome.schedule].coefficients
    rows = []
    for k, checkpoint in enumerate(plan.run.checkpoints):
        digests = checkpoint.digests
        rows.append(
            {
                "path": checkpoint.path,
                "step": checkpoint.step,
                "coefficient": coefficients[k],
                "weight": outcome.weights[k],
                "files": [
                    {"path": s.path, "bytes": s.size, "mtime_ns": s.mtime_ns, "header": digest}
                    for s, digest in zip(checkpoint.files, digests, strict=True)
                    if s.path  # else it is yet to be unpacked from the others
                ],
            }
        )
    return rows


def plan_digest(document: dict[str, Any], outcome: Outcome) -> str:
    """Return what two plans share when they would write the same output.

    Inputs count by name, size, time and header, not by directory; versions do not count.
    """
    inputs = [
        {
            **row,
            "path": _last(row["path"]),
            "files": [{**file, "path": _last(file["path"])} for file in row["files"]],
        }
        for row in document["inputs"]
    ]
    output = {key: value for key, value in document["output"].items() if key != "path"}
    entries = [[e.name, e.dtype.name, e.shape, e.part, e.source] for e in outcome.layout.entries]
    side = [
        [file.name, os.stat(file.copy_of).st_mtime_ns]
        for file in outcome.layout.files
        if file.copy_of
    ]
    rest = {"inputs": inputs, "output": output, "entries": entries, "side": side}
    average = document["average"]
    return provenance.digest_of({**rest, "average": average})


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def sealed(
    document: dict[str, Any],
    digest: str,
    fingerprint: str,
    files: Sequence[tuple[int, Sequence[str]]],
) -> dict[str, Any]:
    """Return `document` with what is known only when the output is finished.

    `files` are (size, checksums) of the finished files.
    """
    described = [
        {**file, "bytes": n_bytes, "crc32c": list(sums)}
        for file, (n_bytes, sums) in zip(document["output"]["files"], files, strict=True)
    ]
    output = {**document["output"], "files": described, "fingerprint": fingerprint}
    output["checksum_bytes"] = provenance.CHECKSUM_BYTES
    return {**document, "output": output, "plan": digest}

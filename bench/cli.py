"""The command line of the benchmarks."""

import argparse
import json
from pathlib import Path

from bench.budgets import verdicts
from bench.contestants import Group
from bench.datasets import catalogue, create_missing
from bench.groups import GROUPS
from bench.measure import Score, run_group, say
from bench.peer import BESIDE, VARIABLE, torch_peer
from bench.report import budget_table, document, group_table, machine, machine_text


def group_list(text: str) -> list[str]:
    """Parse the value of ``--only``."""
    keys = text.split(",")
    unknown = [key for key in keys if key not in GROUPS]
    if unknown:
        known = ",".join(GROUPS)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {known}")
    return keys


def positive(text: str) -> int:
    """Parse a number of rounds."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure ema-avg against the limit of this machine and a NumPy script.",
        epilog="Exit code 1 when a contestant failed; slowness is reported, never a failure. "
        f"fairseq's way runs in the Python with torch that {VARIABLE} names, else in {BESIDE}.",
    )
    options.add_argument("--dir", type=Path, default=Path("build/bench"), help="data directory")
    options.add_argument("--only", type=group_list, default=list(GROUPS), metavar=",".join(GROUPS))
    options.add_argument("--rounds", type=positive, help="runs per contestant (5, quick 2)")
    options.add_argument("--quick", action="store_true", help="an eighth of the data, 2 rounds")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    return options


def show_failures(groups: list[tuple[Group, list[Score]]]) -> bool:
    """Print why contestants failed; tell whether any did."""
    failed = [(group, score) for group, scores in groups for score in scores if score.error]
    for group, score in failed:
        say(f"\nFAILED {group.key}: {score.contestant.name}\n{score.error}")
    return bool(failed)


def main() -> int:
    """Run the benchmarks and print what they found."""
    options = parser().parse_args()
    rounds = options.rounds or (2 if options.quick else 5)
    data = (options.dir / "quick" if options.quick else options.dir).resolve()
    sets = catalogue(quick=options.quick)
    groups = [GROUPS[key](sets, data) for key in options.only]
    create_missing(
        {d.key: d for g in groups for d in g.data_sets}.values(), data, quick=options.quick
    )
    facts = machine()
    done = [(group, run_group(group, data, rounds)) for group in groups]
    found = verdicts({group.key: scores for group, scores in done})
    print(machine_text(facts), end="\n\n")
    print(f"Best and median of {rounds} rounds; ratio is (process - start) / limit.", end="\n\n")
    if "torch" in options.only and torch_peer() is None:
        print(f"fairseq's way is left out: no torch in {BESIDE} or {VARIABLE}.", end="\n\n")
    for group, scores in done:
        print(group_table(group, scores), end="\n\n")
    print(budget_table(found))
    if options.json:
        report = document(facts, done, found, rounds)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(show_failures(done))

"""Child process that opens one checkpoint: its index is parsed, with all checksums, once.

It prints its own time as JSON, without the start of the interpreter and without imports.
"""

import argparse
import json
import sys
import time

from ema_cli.api import inspect


def main() -> int:
    """Measure once and print the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.opening", description=__doc__)
    parser.add_argument("checkpoint")
    checkpoint = parser.parse_args().checkpoint
    began = time.perf_counter()
    inspect(checkpoint)
    print(json.dumps({"seconds": time.perf_counter() - began}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

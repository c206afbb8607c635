"""``python -m durability``."""

import os

# Before NumPy: its library of linear algebra starts threads, and we fork.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from durability.process import warm_up

warm_up()

from durability.cli import main  # noqa: E402  # after the executor is replaced

if __name__ == "__main__":
    raise SystemExit(main())

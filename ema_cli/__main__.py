"""The ``ema-avg`` command, and ``python -m ema_cli``."""

import gc
import os
import signal


def start() -> None:
    """Be the command; Ctrl-C while it is still being loaded ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # An index is hundreds of thousands of tuples without a cycle: looking for one again and again
    # took a fifth of the time over 20,000 tensors; while modules are loaded it is no use either.
    gc.set_threshold(1 << 20)
    # NumPy's linear algebra would start a thread for each core, spinning beside our own workers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ema_cli.cli import entry

    entry()


if __name__ == "__main__":
    start()

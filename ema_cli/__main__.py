"""The ``ema-avg`` command, and ``python -m ema_cli``."""

import signal


def start() -> None:
    """Be the command; Ctrl-C while it is still being loaded ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ema_cli.cli import entry

    entry()


if __name__ == "__main__":
    start()

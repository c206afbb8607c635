"""``python -m ema_cli``."""

from ema_cli.cli import entry

if __name__ == "__main__":
    entry()

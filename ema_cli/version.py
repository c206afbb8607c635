"""The version of ema-avg, in one place."""

__version__ = "0.1.0"

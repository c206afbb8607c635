"""Benchmarks of ``ema-avg`` against what the machine can do and what a NumPy user would write.

Run it with ``python -m bench`` from the root of the repository (Linux only). Nothing here
asserts a time: the numbers are printed beside their budgets, for a person to read.
"""

"""Durable shadows: averages that outlive the process that makes them, and grow with a run."""

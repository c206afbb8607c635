"""Imported by every interpreter whose PYTHONPATH leads here."""

import watch

watch.from_environment()

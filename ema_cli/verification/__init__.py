"""Whether an output still is what was written, and what its sources give."""

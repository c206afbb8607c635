"""What a NumPy user writes to average checkpoints: ``numpy_script.py DTYPE OUTPUT INPUT...``."""

import sys

import numpy as np
from safetensors.numpy import load_file, save_file

dtype, output, first, *others = sys.argv[1:]
if dtype == "bfloat16":
    import ml_dtypes  # noqa: F401  makes NumPy know the name, without which loading fails

coefficient = np.float32(1) - np.float32(0.9)
shadows = {name: value.astype(np.float32, copy=False) for name, value in load_file(first).items()}
for path in others:
    for name, value in load_file(path).items():
        shadow = shadows[name]
        shadow -= coefficient * (shadow - value.astype(np.float32, copy=False))

save_file({name: shadow.astype(dtype, copy=False) for name, shadow in shadows.items()}, output)

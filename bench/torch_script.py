"""What fairseq does to average checkpoints, on plain ones: ``torch_script.py OUTPUT INPUT...``."""

import sys

import torch

output, *inputs = sys.argv[1:]
sums: dict[str, torch.Tensor] = {}
for path in inputs:
    for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value.clone()

for total in sums.values():
    total.div_(len(inputs))
torch.save(sums, output)

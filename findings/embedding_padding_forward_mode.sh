#!/usr/bin/env bash
# PyTorch 2.13.0: the backward of F.embedding with padding_idx leaves the padding row out, its forward mode does
# not. So the two give another derivative of one function wherever the row moves, as that of a tied head does;
# scale_grad_by_freq is in the backward alone as well.
# Seen: "padding row: backward 0.0, forward mode 1.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - << 'EOF'
import torch
import torch.nn.functional as F

tokens = torch.tensor([0, 1])


def total(weight: torch.Tensor) -> torch.Tensor:
    return F.embedding(tokens, weight, padding_idx=0).sum()


weight = torch.ones(3, 1, requires_grad=True)
(gradient,) = torch.autograd.grad(total(weight), weight)
row = torch.zeros(3, 1)
row[0] = 1
_, tangent = torch.func.jvp(total, (weight.detach(),), (row,))
seen = f"padding row: backward {gradient[0].item()}, forward mode {tangent.item()}"
print(seen)
assert seen == "padding row: backward 0.0, forward mode 1.0", "it has changed"
EOF

#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): on a transposed input, as batch_first attention has it, torch.nn.functional.linear gives other
# bits in float64 when its weight requires a gradient than when it does not: another order of copies and products is
# chosen by requires_grad. So a second forward of the same values, without a graph, is not bitwise the first.
# Seen: "same bits with and without requires_grad: contiguous True, transposed False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - << 'EOF'
import torch
from torch.nn.functional import linear

torch.manual_seed(0)
shapes = (24, 8), (24,), (7, 3, 8)
weight, bias, batch_first = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
transposed = batch_first.transpose(0, 1)
found = {}
for name, x in (("contiguous", transposed.contiguous()), ("transposed", transposed)):
    without = linear(x, weight, bias)
    found[name] = linear(x, weight.clone().requires_grad_(), bias).detach()
    assert torch.allclose(found[name], without, rtol=1e-12)
    found[name] = torch.equal(found[name], without)
seen = "same bits with and without requires_grad: " + ", ".join(f"{name} {same}" for name, same in found.items())
print(seen)
assert seen == "same bits with and without requires_grad: contiguous True, transposed False", "it has changed"
EOF

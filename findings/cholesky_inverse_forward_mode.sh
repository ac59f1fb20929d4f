#!/usr/bin/env bash
# PyTorch 2.13.0: forward mode of torch.cholesky_inverse is not its derivative. Its backward is right, and so are
# central differences; the tangent of forward mode is off by more than a tenth, and nothing says so.
# Seen: "differences agree with the backward: True, with forward mode: False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - << 'EOF'
import torch

torch.manual_seed(0)
factor = torch.randn(4, 4, dtype=torch.float64).tril() + 3 * torch.eye(4)
direction = torch.randn(4, 4, dtype=torch.float64).tril()
cotangent = torch.randn(4, 4, dtype=torch.float64)
h = 1e-6
above, below = (torch.cholesky_inverse(factor + sign * h * direction) for sign in (1, -1))
differences = ((above - below) / (2 * h) * cotangent).sum()
leaf = factor.clone().requires_grad_()
(gradient,) = torch.autograd.grad(torch.cholesky_inverse(leaf), leaf, cotangent)
backward = (gradient * direction).sum()
_, tangent = torch.func.jvp(torch.cholesky_inverse, (factor,), (direction,))
forward = (tangent * cotangent).sum()
print(f"differences {differences:.6f}, backward {backward:.6f}, forward mode {forward:.6f}")
agree = [torch.allclose(differences, other, rtol=1e-6) for other in (backward, forward)]
seen = f"differences agree with the backward: {agree[0]}, with forward mode: {agree[1]}"
print(seen)
assert seen == "differences agree with the backward: True, with forward mode: False", "it has changed"
EOF

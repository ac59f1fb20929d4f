#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): a scripted module that has run twice with gradients goes on making a graph inside
# torch.no_grad(). What it returns there requires grad, and gradients flow through it as if no_grad were not there. A
# module of the same code that runs inside no_grad from the beginning gives no graph, as does the one that is not
# scripted. So a frozen teacher or a target computed under no_grad trains after all, depending on what ran before.
# Seen: "requires grad inside no_grad: plain False, scripted, first used there False, scripted, used with gradients
# before True; gradient through the last one 7.5".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/look.py" << 'EOF'
import warnings

import torch

warnings.simplefilter("ignore")

class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * 2.0 + x * 0.5

class Other(torch.nn.Module):
    def forward(self, x):
        return x * 2.0 + x * 0.5

x = torch.ones(3, requires_grad=True) * 1

def inside(module):
    with torch.no_grad():
        return module(x)

used = torch.jit.script(Scaled())
for _ in range(2):
    used(x).sum().backward(retain_graph=True)
kept = inside(used)
seen = (
    f"requires grad inside no_grad: plain {inside(Scaled()).requires_grad}, "
    f"scripted, first used there {inside(torch.jit.script(Other())).requires_grad}, "
    f"scripted, used with gradients before {kept.requires_grad}; "
    f"gradient through the last one {torch.autograd.grad(kept.sum(), x)[0].sum().item()}"
)
print(seen)
assert seen == (
    "requires grad inside no_grad: plain False, scripted, first used there False, "
    "scripted, used with gradients before True; gradient through the last one 7.5"
), "it has changed"
EOF
"$folder/bin/python" "$folder/look.py"

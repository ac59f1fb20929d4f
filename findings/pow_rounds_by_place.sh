#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU, float32): pow and atan2 give a number other bits by where in a tensor it stands. Full vectors go
# through one implementation and what is left at the end through another, and they round differently. So three numbers
# of a tensor, taken alone, do not come to what they came to in it. exp, log, sqrt and tanh do not depend on the place.
# Seen: "runs of three that come to other bits alone, of 998: pow some, atan2 some, exp none, log none, sqrt none,
# tanh none" (on one processor 121 of pow and 464 of atan2).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - << 'EOF'
import torch

torch.manual_seed(0)
x = torch.rand(1000) + 0.5
functions = {
    "pow": lambda a: a.pow(0.8),
    "atan2": lambda a: torch.atan2(a, a * a),
    **{name: getattr(torch, name) for name in ("exp", "log", "sqrt", "tanh")},
}
counts = {}
for name, function in functions.items():
    whole = function(x)
    alone = (torch.equal(function(x[i : i + 3].clone()), whole[i : i + 3]) for i in range(998))
    counts[name] = sum(not same for same in alone)
    assert torch.allclose(function(x[:3].clone()), whole[:3], rtol=1e-6)
print(counts)
seen = "runs of three that come to other bits alone, of 998: "
seen += ", ".join(f"{name} {'some' if count else 'none'}" for name, count in counts.items())
print(seen)
wanted = "pow some, atan2 some, exp none, log none, sqrt none, tanh none"
assert seen == "runs of three that come to other bits alone, of 998: " + wanted, "it has changed"
EOF

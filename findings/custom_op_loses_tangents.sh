#!/usr/bin/env bash
# PyTorch 2.13.0: an operation of torch.library.custom_op with a registered backward has no forward mode, and
# does not say so. Its output has no tangent, as if it did not depend on the input; torch.func.jvp gives 0.
# An autograd.Function without jvp raises at the same place.
# Seen: "backward 6.0, tangent None, jvp 0.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - << 'EOF'
import torch
import torch.autograd.forward_ad as forward_ad


@torch.library.custom_op("findings::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, gradient: 2 * ctx.saved_tensors[0] * gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
x = torch.tensor(3.0, requires_grad=True)
(gradient,) = torch.autograd.grad(square(x), x)
with forward_ad.dual_level():
    dual = forward_ad.make_dual(torch.tensor(3.0), torch.tensor(1.0))
    tangent = forward_ad.unpack_dual(square(dual)).tangent
_, product = torch.func.jvp(square, (torch.tensor(3.0),), (torch.tensor(1.0),))
seen = f"backward {gradient.item()}, tangent {tangent}, jvp {product.item()}"
print(seen)
assert seen == "backward 6.0, tangent None, jvp 0.0", "it has changed"
EOF

#!/usr/bin/env bash
# Forward mode of BatchNorm in bfloat16 with weights in float32, as autocast has it, PyTorch 2.13.0 on
# the CPU. Run eagerly, value and tangent are bfloat16. Where torch.compile traces the same function
# (on FakeTensors), the value is bfloat16 and the tangent float32, and the convolution after it is
# refused, though it works uncompiled. Seen on 2026-11-29:
#
#   eager: value torch.bfloat16, tangent torch.bfloat16
#   traced: value torch.bfloat16, tangent torch.float32
#   convolution after it, eager: torch.bfloat16
#   convolution after it, compiled: Input type (torch.float32) and weight type (torch.bfloat16) should be the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/environment/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode


def normalised(x, dx, weight, dweight):
    y = F.batch_norm(
        forward_ad.make_dual(x, dx),
        None,
        None,
        forward_ad.make_dual(weight, dweight),
        None,
        training=True,
    )
    return y


def arguments():
    images = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)
    return images, torch.randn_like(images), torch.ones(4), torch.randn(4)


def dtypes():
    dual = forward_ad.unpack_dual(normalised(*arguments()))
    return dual.primal.dtype, dual.tangent.dtype


def convolved(x, dx, weight, dweight, kernel):
    y = F.conv2d(normalised(x, dx, weight, dweight), kernel)
    return forward_ad.unpack_dual(y).tangent


with forward_ad.dual_level():
    eager = dtypes()
    with FakeTensorMode():
        traced = dtypes()
    print("eager: value %s, tangent %s" % eager)
    print("traced: value %s, tangent %s" % traced)
    given = *arguments(), torch.randn(4, 4, 3, 3, dtype=torch.bfloat16)
    print("convolution after it, eager:", convolved(*given).dtype)
    try:
        torch.compile(convolved, backend="eager", fullgraph=True)(*given)
        refused = ""
    except Exception as error:
        message = str(error)
        refused = message[message.find("Input type") :].split("'")[0]
    print("convolution after it, compiled:", refused)
assert eager == (torch.bfloat16, torch.bfloat16)
assert traced == (torch.bfloat16, torch.float32)
assert refused.startswith("Input type (torch.float32) and weight type (torch.bfloat16)")
PYTHON

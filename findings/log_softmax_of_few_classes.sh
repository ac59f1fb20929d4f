#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): log_softmax and softmax over the last dimension take ten times as long for rows that do not fill
# a vector as for longer ones: 1,280 rows of 7 float32 take 125 to 210 µs, of 8 take 16 µs (AVX2, vectors of 8); with AVX-512,
# vectors of 16, rows of 10 take 200 µs and of 16 take 21 µs. Rows that are too short go through a scalar exp, a
# remainder after full vectors does not. CIFAR-10, MNIST and all else with ten classes are on the slow side on newer
# processors. Down the columns of the transpose, the copy included, it takes 28 µs.
# Seen: "7 classes take over 3 times as long as 8, and over 2 times as long as down the columns".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
ATEN_CPU_CAPABILITY=avx2 "$folder/bin/python" - << 'EOF'
import timeit

import torch

torch.set_num_threads(1)
assert torch.backends.cpu.get_cpu_capability() == "AVX2", "it takes a processor with AVX2"

def microseconds(function):
    return min(timeit.repeat(function, number=100, repeat=9)) * 1e4

seven, eight = torch.randn(1280, 7), torch.randn(1280, 8)
assert torch.allclose(seven.log_softmax(1), seven.t().log_softmax(0).t(), atol=1e-6)
slow = microseconds(lambda: seven.log_softmax(1))
fast = microseconds(lambda: eight.log_softmax(1))
columns = microseconds(lambda: seven.t().log_softmax(0))
print(f"{slow:.0f} µs for 7 classes, {fast:.0f} for 8, {columns:.0f} for 7 down the columns")
assert slow > 3 * fast and slow > 2 * columns, "it has changed"
print("7 classes take over 3 times as long as 8, and over 2 times as long as down the columns")
EOF

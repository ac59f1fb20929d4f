"""The Triton kernels without a GPU: what they compute, and what they compile to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.2", reason="Triton has wheels for Linux only")
from triton_code import ARCHITECTURES, TOOLS, machine_code


def test_the_interpreter_agrees_with_float64() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "tests/triton_parity.py"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not TOOLS.is_dir(), reason="no disassembler beside this Triton")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_aligned_rows_move_128_bits_at_a_time(architecture) -> None:
    kernels = machine_code(architecture)
    assert [k for k in kernels if k.stack_bytes or k.num_spills] == []
    wide = [k for k in kernels if k.options["ALIGNMENT"] == 16]
    for kernel in wide:
        num_elements = kernel.options["ROWS"] * kernel.options["BLOCK"]
        num_accesses = num_elements // (kernel.options["VECTOR"] * 32 * kernel.options["num_warps"])
        num_matrices = 2 if "tangent" in kernel.name else 1
        assert kernel.num_wide_loads == num_matrices * num_accesses, kernel
        assert kernel.num_wide_stores == ("backward" in kernel.name) * num_accesses, kernel
    # 100 classes in float32, 1000 and 8,192 a block in both; forward with and without smoothing
    assert len(wide) == 20

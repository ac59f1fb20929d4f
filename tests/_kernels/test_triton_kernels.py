"""The Triton kernels without a GPU: what they compute, and what they compile to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.2", reason="Triton has wheels for Linux only")
from triton_code import TOOLS, machine_code


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
def test_nothing_spills_and_aligned_rows_move_128_bits_at_a_time() -> None:
    kernels = machine_code(90)  # for the others: `benchmarks/triton_versions.py`
    assert [k for k in kernels if k.stack_bytes or k.num_spills] == []
    assert [k for k in kernels if k.is_narrow] == []
    # 100 classes in float32, 1000 and 8,192 a block in both; forward with and without smoothing
    assert sum(k.options["ALIGNMENT"] == 16 for k in kernels) == 20

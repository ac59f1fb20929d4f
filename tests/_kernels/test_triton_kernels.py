"""The Triton kernels without a GPU: what they compute, and what they compile to."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", "3.9", reason="Triton has wheels for Linux only")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from reweight._kernels import triton_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NUM_CLASSES = [10, 100, 1000, 32000, 50257, 128256]


def test_the_interpreter_agrees_with_float64() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "tests/triton_parity.py"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Driver:
    """As much of a GPU's driver as compiling takes; each architecture is a device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@pytest.fixture
def compiled(monkeypatch):
    """What the launcher would launch on an architecture: the compiled kernels, by their hash."""
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *args, warmup, **options) -> None:
        kernel = run(self, *args, warmup=True, **options)
        kernels[kernel.hash] = kernel

    def compile(architecture: int, logits: torch.Tensor, label_smoothing: float):
        monkeypatch.setattr(driver, "_active", Driver(architecture))
        options = [torch.zeros(2, dtype=torch.int64), -100, label_smoothing]
        _, confidence, _, peak = triton_kernels.forward([logits], *options)
        upstream = torch.ones(1, 2)
        triton_kernels.backward([logits], *options, peak, confidence, upstream)
        return kernels

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return compile


@pytest.mark.skipif(not TOOLS.is_dir(), reason="no disassembler beside this Triton")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_nothing_spills_and_aligned_rows_move_128_bits_at_a_time(
    architecture, compiled, tmp_path
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for num_classes in NUM_CLASSES:
            storage = torch.empty(2 * num_classes + 1, dtype=dtype)
            aligned, misaligned = (z.view(2, num_classes) for z in (storage[:-1], storage[1:]))
            compiled(architecture, aligned, 0.0)
            kernels = compiled(architecture, misaligned, 0.1)  # this takes the most registers

    def disassemble(kernel) -> str:
        cubin = tmp_path / kernel.hash
        cubin.write_bytes(kernel.asm["cubin"])
        tools = ["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "--no-dataflow"]
        return "".join(subprocess.check_output([TOOLS / t, o, cubin], text=True) for t, o in tools)

    with ThreadPoolExecutor() as pool:
        listings = list(pool.map(disassemble, kernels.values()))
    num_wide = 0
    for kernel, listing in zip(kernels.values(), listings, strict=True):
        constants = {kernel.src.fn.arg_names[i]: v for (i,), v in kernel.src.constants.items()}
        assert "STACK:0" in listing, constants
        assert "LOCAL:0" in listing, constants
        assert not re.findall(r"\b(?:STL|LDL)\b", listing), constants
        if constants["ALIGNMENT"] == 16:
            num_wide += 1
            num_bytes = constants["ROWS"] * constants["BLOCK"] * constants["DTYPE"].itemsize
            num_accesses = num_bytes // (16 * 32 * kernel.metadata.num_warps)
            assert len(re.findall(r"\bLDG\.E[.\w]*\.128\b", listing)) == num_accesses, constants
            if "backward" in kernel.name:
                assert len(re.findall(r"\bSTG\.E[.\w]*\.128\b", listing)) == num_accesses, constants
    assert num_wide == 10  # two kernels: 100 classes in float32, 1000 and 8,192 a block in both

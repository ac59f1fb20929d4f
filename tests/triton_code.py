"""What the Triton kernels compile to for a GPU that is not there: no driver, no launch.

`_kernels/test_triton_kernels.py` asserts it of one Triton and architecture,
`benchmarks/triton_versions.py` lists it of all.
"""

import re
import subprocess
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from reweight._kernels.implementations import kernel_backward, kernel_forward, kernel_tangent

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION_BYTES = 16
NUM_CLASSES = [10, 100, 1000, 32000, 50257, 128256]


class MachineCode(NamedTuple):
    """One compiled kernel, by what its instructions say."""

    name: str
    options: dict[str, Any]
    """Its constants, and how many warps a program has."""
    num_registers: int
    stack_bytes: int
    num_spills: int
    """Instructions that move a register to memory of the thread's own, or back."""
    num_wide_loads: int
    """Instructions that load 128 bits at a time."""
    num_wide_stores: int

    @property
    def is_narrow(self) -> bool:
        """Whether its rows begin at 16 bytes, and yet do not move 128 bits at a time alone."""
        if self.options["ALIGNMENT"] != 16:
            return False
        num_elements = self.options["ROWS"] * self.options["BLOCK"]
        num_accesses = num_elements // (self.options["VECTOR"] * 32 * self.options["num_warps"])
        num_matrices = 2 if "tangent" in self.name else 1
        wanted = num_matrices * num_accesses, ("backward" in self.name) * num_accesses
        return (self.num_wide_loads, self.num_wide_stores) != wanted


class _Driver:
    """As much of a GPU's driver as compiling takes."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def machine_code(architecture: int) -> list[MachineCode]:
    """What would be launched on it for rows of few and many classes, aligned and not."""
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *args, warmup, **options) -> None:
        kernel = run(self, *args, warmup=True, **options)
        kernels[kernel.hash] = kernel, options

    def launch(logits: torch.Tensor, label_smoothing: float) -> None:
        options = [torch.zeros(2, dtype=torch.int64), -100, label_smoothing]
        *_, peak, scale, _ = kernel_forward("triton", [logits], *options, False)
        upstream = torch.ones(1, 2)
        kernel_backward("triton", [logits], *options, peak, scale, upstream, False)
        kernel_tangent("triton", [logits], *options, peak, scale, [logits])

    with patch.dict(vars(driver)), patch.object(JITFunction, "run", compile_only):
        driver.set_active(_Driver(architecture))
        for dtype in (torch.float32, torch.bfloat16):
            for num_classes in NUM_CLASSES:
                storage = torch.empty(2 * num_classes + 1, dtype=dtype)
                for part in (storage[:-1], storage[1:]):
                    for label_smoothing in (0.0, 0.1):
                        launch(part.view(2, num_classes), label_smoothing)
    with tempfile.TemporaryDirectory() as folder:
        return _read(list(kernels.values()), architecture, Path(folder))


def _read(
    kernels: list[tuple[Any, dict[str, Any]]], architecture: int, folder: Path
) -> list[MachineCode]:
    """All instructions go through the disassembler at once, which takes long to begin."""

    def tool(name: str, *arguments: str) -> str:
        command = [TOOLS / name, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        return done.stdout

    usages, parts = [], []
    for number, (kernel, _) in enumerate(kernels):
        (folder / f"{number}.cubin").write_bytes(kernel.asm["cubin"])
        usages.append(tool("cuobjdump", "--dump-resource-usage", f"{number}.cubin"))
        tool("cuobjdump", "--extract-text", "all", f"{number}.cubin")
        (instructions,) = folder.glob(f"{number}-*")
        parts.append(instructions.read_bytes())
    (folder / "instructions").write_bytes(b"".join(parts))
    listing = tool("nvdisasm", "--no-dataflow", "--binary", f"SM{architecture}", "instructions")
    lines = iter(re.findall(r"^ +/\*[0-9a-f]+\*/ +(.*)", listing, re.MULTILINE))
    sizes = [len(part) // INSTRUCTION_BYTES for part in parts]
    listings = ["\n".join(islice(lines, size)) for size in sizes]
    assert not list(lines), "a line for each instruction"
    return [
        _machine_code(kernel, options, usage, own)
        for (kernel, options), usage, own in zip(kernels, usages, listings, strict=True)
    ]


def _machine_code(kernel: Any, options: dict[str, Any], usage: str, listing: str) -> MachineCode:
    sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        name=kernel.name,
        options=options,
        num_registers=sizes["REG"],
        stack_bytes=sizes["STACK"] + sizes["LOCAL"],
        num_spills=len(re.findall(r"\b(?:STL|LDL)\b", listing)),
        num_wide_loads=len(re.findall(r"\bLDG\.E[.\w]*\.128\b", listing)),
        num_wide_stores=len(re.findall(r"\bSTG\.E[.\w]*\.128\b", listing)),
    )

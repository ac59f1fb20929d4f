"""The Triton kernels under every Triton that a supported PyTorch pins, without a GPU.

Each version is installed into a folder of its own, beside a NumPy that its interpreter can use, and
stands before this environment's on the path; PyTorch is this environment's. It runs
`tests/triton_parity.py` in Triton's interpreter, and compiles the kernels for three architectures:
what is used of the stack, and how many instructions move registers to it and back.

    python benchmarks/triton_versions.py   # about twenty minutes; 250 MB of wheels for each version
    python benchmarks/triton_versions.py 3.6.0 3.7.1
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).parents[1]
VERSIONS = {  # what each pins: `pip install --dry-run --no-deps torch==...` lists it
    "3.2.0": "2.6",
    "3.3.1": "2.7",
    "3.4.0": "2.8",
    "3.5.1": "2.9",
    "3.6.0": "2.10, 2.11",
    "3.7.0": "2.12",
    "3.7.1": "2.13",
    "3.8.0": "2.14",
}
# Before 3.7 the interpreter takes int() of arrays of one element: NumPy 2.3 warns, 2.4 refuses.
OLDER_NUMPY = "2.3.5"
WARNING = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
COMPILE = """
import json, triton_code
for architecture in (80, 90, 100):
    try:
        kernels = triton_code.machine_code(architecture)
    except RuntimeError as error:
        if "is not defined for option 'gpu-name'" not in str(error):
            raise
        print(json.dumps({"architecture": architecture, "kernels": "none"}))  # newer than Triton
        continue
    print(json.dumps({
        "architecture": architecture,
        "kernels": len(kernels),
        "registers": max(kernel.num_registers for kernel in kernels),
        "stack": max(kernel.stack_bytes for kernel in kernels),
        "spills": sum(kernel.num_spills for kernel in kernels),
        "narrow": sum(kernel.is_narrow for kernel in kernels),
    }))
"""


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command where what is installed in the folder is found first."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def check(version: str) -> dict[str, Any]:
    """Parity cases passed, and what the compiled kernels use."""
    is_old = tuple(map(int, version.split(".")[:2])) < (3, 7)
    numpy_version = OLDER_NUMPY if is_old else numpy.__version__
    with tempfile.TemporaryDirectory() as name:
        packages = [f"triton=={version}", f"numpy=={numpy_version}"]
        options = ["--quiet", "--no-deps", "--target", name]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *packages], check=True)
        pytest = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-W", WARNING, "-vv"]
        parity = run(Path(name), *pytest, "tests/triton_parity.py", TRITON_INTERPRET="1")
        outcomes = re.findall(r"^\S+triton_parity.py::\S+.* (\w+) ", parity.stdout, re.M)
        compiled = run(Path(name), "-c", COMPILE)
    for each in (parity, compiled):
        if each.returncode:
            print(each.stdout[-5000:], each.stderr[-5000:], file=sys.stderr)
    return {
        "numpy": numpy_version,
        "passed": outcomes.count("PASSED"),
        "cases": len(outcomes),
        "compiled": [json.loads(line) for line in compiled.stdout.splitlines()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS))
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}")
    print("stack: the most bytes that a kernel uses; spills: instructions in all kernels together;")
    print("narrow: kernels whose rows are aligned and yet do not move 128 bits at a time")
    names = ("Triton", "pinned by", "NumPy", "parity")
    columns = ("architecture", "kernels", "registers", "stack", "spills", "narrow")
    print("{:<8}{:<12}{:<7}{:>9}".format(*names) + "".join(f"{name:>13}" for name in columns))
    for version in parser.parse_args().versions:
        found = check(version)
        parity = f"{found['passed']} of {found['cases']}"
        pinned = VERSIONS.get(version, "")
        head = f"{version:<8}{pinned:<12}{found['numpy']:<7}{parity:>9}"
        for row in found["compiled"] or [{"kernels": "fails"}]:
            print(head + "".join(f"{row.get(name, ''):>13}" for name in columns), flush=True)
            head = " " * len(head)


if __name__ == "__main__":
    main()

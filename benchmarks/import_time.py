"""What ``import reweight`` adds to ``import torch``.

In fresh processes, one after the other, torch, then torchopt, then reweight are imported, each
timed; numpy comes with torch. One more process goes first and compiles the bytecode, as pip does.
Most of what is left is one full garbage collection, over what torch has allocated: it comes due
somewhere in what is imported after it.

    python benchmarks/import_time.py   # half a minute
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch

MODULES = ("torch", "torchopt", "reweight")
CODE = """
import json, time
seconds = {}
for name in %r:
    start = time.perf_counter()
    __import__(name)
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def seconds_of_a_process() -> dict[str, float]:
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE % (MODULES,)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-processes", type=int, default=21)
    settings = parser.parse_args()
    runs = [seconds_of_a_process() for _ in range(settings.num_processes + 1)][1:]
    rows = {name: [run[name] for run in runs] for name in MODULES}
    rows["added to torch"] = [run["torchopt"] + run["reweight"] for run in runs]
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, {len(runs)} processes")
    print(f"{'ms':<16}{'least':>8}{'median':>8}{'most':>8}")
    for name, seconds in rows.items():
        figures = (min(seconds), statistics.median(seconds), max(seconds))
        print(f"{name:<16}" + "".join(f"{1e3 * value:8.0f}" for value in figures))


if __name__ == "__main__":
    main()

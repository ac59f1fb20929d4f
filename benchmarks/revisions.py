"""Two revisions of this library against each other: each in a process of its own, in turns."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = """
import sys, time
from contestants import contestant
step, num_steps = contestant(*sys.argv[1:4])
step()
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    print((time.perf_counter() - start) / num_steps, flush=True)
"""


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with that revision of the repository."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "revision"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def start(folder: Path, *names: str) -> subprocess.Popen[str]:
    """A process that takes a round of steps of that contestant for each line it reads."""
    path = os.pathsep.join(map(str, (folder, folder / "benchmarks", folder / "examples")))
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *names],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder / "benchmarks",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"{' '.join(names)} does not run in {folder}")
    return process


def seconds(process: subprocess.Popen[str]) -> float:
    """How long a step of its next round takes."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def ratios(revision: str, net: str, optimizer: str, contestant: str, rounds: int) -> list[float]:
    """The time of a step here over that at the revision, one for each round."""
    with checked_out(revision) as folder:
        processes = [start(each, net, optimizer, contestant) for each in (ROOT, folder)]
        try:
            found = []
            for i in range(rounds):
                order = processes if i % 2 else processes[::-1]  # none always goes first
                taken = {id(process): seconds(process) for process in order}
                found.append(taken[id(processes[0])] / taken[id(processes[1])])
            return found
        finally:
            for process in processes:
                process.kill()
                process.wait()


def print_comparison(revision: str, net: str, optimizer: str, name: str, rounds: int) -> None:
    """The median of the ratios, and their quartiles."""
    found = ratios(revision, net, optimizer, name, rounds)
    low, middle, high = statistics.quantiles(found, n=4)
    spread = f"({low:.3f} to {high:.3f})"
    print(f"{net:>7} {optimizer:>6}  {name:<33} {middle:>6.3f} {spread}", flush=True)

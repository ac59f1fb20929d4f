"""Starting ranks: forked from one process that has loaded PyTorch, and never waited for in vain."""

import functools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.run

from reweight._passes.forward_mode import load_forward_mode

_PRELOADED = [
    *("torch._dynamo", "torch.distributed.run", "train", "fault_training", "fsdp_cases"),
    *(f"tests.integrations.test_{name}" for name in ("huggingface", "lightning")),
]
load_forward_mode()


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # Before Python 3.12.4 it is not told where to find them.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    with patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def forked(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process that has everything loaded and calls the function."""
    process = _context().Process(target=function, args=args)
    process.start()
    return process


def run_ranks(num_ranks: int, function: Callable[..., None], *args: Any, seconds: float) -> None:
    """Call ``function(rank, *args)`` on every rank; kill those that take longer, and fail."""
    processes = [forked(function, rank, *args) for rank in range(num_ranks)]
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
        processes[rank].join()
    assert not hanging, f"ranks {hanging} took more than {seconds} seconds"


def run_torchrun(output: Path, *arguments: str, seconds: float) -> str:
    """What ``torchrun --standalone`` prints, to this file, with two ranks that are forked too."""
    process = forked(_torchrun, output, arguments)
    process.join(seconds)
    process.kill()
    process.join()
    printed = output.read_text()
    assert process.exitcode == 0, printed
    return printed


def _torchrun(output: Path, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    with open(output, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    # Or a second life may meet at the addresses that the first left in a shared store.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options = ["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=fork"]
    torch.distributed.run.main([*options, *arguments])


@contextmanager
def process_group(rank: int, num_ranks: int, meet: str, seconds: float = 60) -> Iterator[None]:
    """Ranks that meet at this address, of which one gives up on another after so many seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=meet,
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=seconds),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result, or the error as text."""
    try:
        return function(*args)
    except BaseException:  # also those by which pytest fails a test
        return traceback.format_exc()

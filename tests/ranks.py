"""Starting ranks: forked from one process that has loaded PyTorch, and never waited for in vain."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from reweight._passes.forward_mode import load_forward_mode

_PRELOADED = ["fault_training", "fsdp_cases", "torch._dynamo"]
load_forward_mode()


def run_ranks(num_ranks: int, function: Callable[..., None], *args: Any, seconds: float) -> None:
    """Call ``function(rank, *args)`` on every rank; kill those that take longer, and fail."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    processes = [context.Process(target=function, args=(rank, *args)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
        processes[rank].join()
    assert not hanging, f"ranks {hanging} took more than {seconds} seconds"


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

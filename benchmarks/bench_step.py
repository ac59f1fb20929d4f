"""The same steps under pytest-benchmark, for its statistics and its comparison of saved runs.

    pytest benchmarks/bench_step.py --benchmark-only                # about 30 minutes on two cores
    pytest benchmarks/bench_step.py --benchmark-only -k "vit and adamw" --benchmark-autosave

Ratios are better taken from ``step_cost.py``, where the contestants take turns.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from contestants import CONTESTANTS, UNSUPPORTED, contestant
from nets import NETS, OPTIMIZERS


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_step(benchmark: BenchmarkFixture, net: str, optimizer_name: str, name: str) -> None:
    if (name, optimizer_name) in UNSUPPORTED:
        pytest.skip(f"{name} does not know {optimizer_name}")
    benchmark.group = f"{net}, {optimizer_name}"
    step, num_steps = contestant(net, optimizer_name, name)
    benchmark.pedantic(step, iterations=num_steps, rounds=7, warmup_rounds=1)

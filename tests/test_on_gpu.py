"""The script for a card runs on the CPU, small: every stage, and what becomes of a failure."""

import io
import json
import math
import sys
import time
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import on_gpu
from card import cost, exactness, kernels, problems, timing
from card.timing import Run
from nets import TINY_NETS, Net
from on_gpu import AGAIN, Report, measure, run_stage

CPU = Run("cpu", True, None, math.inf)
WANTED = {"exactness": "exact", "kernels": "exact", "cost": "measured", "training": "measured"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch's profiler
@pytest.mark.parametrize("stage", on_gpu.LIMITS)
def test_every_row_comes_of_something(stage, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows = list(measure(stage, CPU))
    assert {row["outcome"] for row in rows} <= {"exact", "measured", "not watched"}
    assert all(row == json.loads(json.dumps(row)) for row in rows)
    assert WANTED[stage] in {row["outcome"] for row in rows}
    compiled = [row["graphs compiled"] for row in rows if "graphs compiled" in row]
    assert compiled == ([1, 1] if stage == "kernels" else [])
    # Of the library, of a contestant that failed or had no time: these rows are whole.
    assert not any(isinstance(row.get(key), str) for row in rows for key in cost.CONTESTANTS)
    assert not any("logged" in row for row in rows)


def case(name: str, outcome: str) -> on_gpu.Row:
    return {"case": name, "outcome": outcome}


def failing(name: str) -> on_gpu.Row:
    raise ArithmeticError("no such kernel")


def test_a_row_that_fails_says_how_and_the_next_goes_on(monkeypatch) -> None:
    rows = [partial(failing, "conv"), partial(case, "vit", "exact"), partial(case, "lm", "exact")]
    monkeypatch.setattr(on_gpu, "rows_of", lambda *_: iter(rows))
    failed, *others = measure("cost", CPU)
    assert failed == {
        "stage": "cost",
        "case": "conv",
        "outcome": "error",
        "reason": "ArithmeticError: no such kernel",
    }
    assert [row["case"] for row in others] == ["vit", "lm"]
    assert [row["case"] for row in measure("cost", CPU, skip=2)] == ["lm"]
    over = Run("cpu", True, None, time.monotonic() - 1)
    (rest,) = measure("cost", over)
    assert (rest["outcome"], rest["rows"]) == ("not reached", "conv; vit, exact; lm, exact")


def test_a_device_that_is_lost_ends_the_process_after_its_row(monkeypatch) -> None:
    rows = [partial(failing, "conv"), partial(case, "vit", "exact")]
    monkeypatch.setattr(on_gpu, "rows_of", lambda *_: iter(rows))
    monkeypatch.setattr(on_gpu, "is_lost", lambda _: True)
    found = measure("cost", CPU)
    assert next(found)["outcome"] == "error"
    with pytest.raises(SystemExit) as ended:
        next(found)
    assert ended.value.code == AGAIN


def stage_of(code: str, seconds: float) -> tuple[list[on_gpu.Row], str]:
    """The rows of a stage whose process runs this; `n` is the row it is to begin with."""
    head = (
        "import json, os, subprocess, sys, time\n"
        "n = int(sys.argv[sys.argv.index('--skip') + 1])\n"
        "def row(n): print(json.dumps({'stage': 'cost', 'case': str(n), 'outcome': 'exact'}))\n"
    )
    out = io.StringIO()
    report = Report(out)
    command = [sys.executable, "-u", "-c", head + code]
    run_stage("cost", command, time.monotonic() + seconds, report)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == report.rows
    return report.rows, report.summary()


def test_a_stage_has_its_time_whatever_holds_its_output(capsys) -> None:
    start = time.monotonic()
    code = (
        "row(0); subprocess.Popen(['sleep', '60']); print('{\"stage\": ', end=''); time.sleep(60)"
    )
    rows, summary = stage_of(code, 2.0)
    assert time.monotonic() - start < 6
    assert [row["outcome"] for row in rows] == ["exact", "stopped at its limit"]
    assert summary == "1 exact, 1 stopped at its limit"
    assert "stopped at its limit" in capsys.readouterr().out
    start = time.monotonic()
    assert stage_of("row(0); subprocess.Popen(['sleep', '60'])", 30.0)[1] == "1 exact"
    assert time.monotonic() - start < 6


def test_another_process_goes_on_where_one_has_died() -> None:
    rows, _ = stage_of(f"row(n); sys.exit({AGAIN} if n < 2 else 0)", 30.0)
    assert [row["case"] for row in rows] == ["0", "1", "2"]
    rows, _ = stage_of("row(n)\nif n == 0: os.abort()", 30.0)
    assert [row["outcome"] for row in rows] == ["exact", "ended with -6", "exact"]
    assert [row["case"] for row in rows] == ["0", "row 2", "2"]
    assert stage_of("sys.exit(3)", 30.0)[1] == "1 ended with 3"


def test_what_a_machine_lacks_is_named(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(on_gpu, "NEEDED", ("torchopt", "no_such_package"))
    with pytest.raises(SystemExit):
        on_gpu.main(["--device", "cpu"])
    assert "no_such_package missing: install the wheels of torchopt" in capsys.readouterr().err
    (row,) = measure("training", Run("cpu", False, tmp_path, math.inf))
    assert row["outcome"] == "error"
    assert "--data-dir" in row["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_to_do(capsys) -> None:
    with pytest.raises(SystemExit):
        on_gpu.main([])
    assert "--device cpu" in capsys.readouterr().err


def test_contestants_that_fail_or_come_late_do_not_stop_the_others() -> None:
    calls: list[str] = []

    def build(name: str) -> timing.Step:
        if name == "fails":
            raise ImportError("not here")
        return lambda: calls.append(name)

    builds = {name: partial(build, name) for name in ("fails", "plain")}
    steps, _, reasons = timing.warm(builds, "cpu", math.inf)
    assert reasons == {"fails": "ImportError: not here"}
    seconds, num_rounds = timing.medians_by_turns(steps, "cpu", -1.0, 9)
    assert (list(seconds), num_rounds) == (["plain"], 1)
    *_, reasons = timing.warm({name: partial(build, name) for name in "ab"}, "cpu", -1.0)
    assert reasons == {"b": "no time left"}
    assert calls[-2:] == ["a", "a"]


@pytest.mark.parametrize("kind", ["float64", "float32", "TF32", "bfloat16", "float16"])
def test_a_hypergradient_that_is_off_is_called_wrong(kind) -> None:
    exact = problems.by_double_backward("conv", problems.Setting("cpu"))
    for factor, outcome in ((1.0, "exact"), (1.05, "wrong")):
        row = exactness.held("conv", kind, factor * exact, {"double backward": exact})
        assert row["outcome"] == outcome
    nan = exactness.held("conv", kind, torch.nan * exact, {"double backward": exact})
    assert nan["outcome"] == "wrong"


@pytest.mark.parametrize("name", ["perceptron", "LSTM", "encoder with dropout"])
def test_one_by_one_is_another_way_to_the_same(name) -> None:
    setting = problems.Setting("cpu")
    found = problems.one_by_one(name, setting)
    assert exactness.error(found, problems.by_double_backward(name, setting)) < 1e-12


class Drawing(nn.Module):
    """Attention with dropout whose dual pass draws masks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = problems.NETS["encoder with dropout"].build()

    def forward(self, x):
        with torch.random.fork_rng():
            if torch.autograd.forward_ad._current_level >= 0:
                torch.rand(1)
            return self.inner(x)


def test_other_masks_in_one_pass_are_near_no_reference(monkeypatch) -> None:
    net = Net(Drawing, 2, problems.sequences)
    monkeypatch.setitem(problems.NETS, "dropout", net)
    setting = problems.Setting("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hypergradients do not agree with the backward
        found = problems.hypergradient("dropout", setting)
    references = exactness.references_of("dropout", setting)
    assert exactness.held("", "bfloat16", found, references)["outcome"] == "wrong"
    assert exactness.error(references["one by one"], references["double backward"]) < 1e-9


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_without_its_kernel_is_called_wrong(monkeypatch) -> None:
    flash = exactness.SDPBackend.FLASH_ATTENTION
    monkeypatch.setitem(exactness.KERNELS, flash, "another_kernel")
    row = next(exactness.attention("cpu"))()
    assert (row["outcome"], row["forward"], row["backward"]) == ("wrong", "0", "0")


class Waiting(nn.Module):
    """Fails or waits in the pass with dual numbers."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.inner, self.does = TINY_NETS["conv"].build(), does

    def forward(self, x):
        if torch.autograd.forward_ad._current_level >= 0:
            if self.does == "waits":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
            else:
                raise RuntimeError("called a synchronizing CUDA operation")
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize("does", ["waits", "fails"])
def test_a_wait_or_another_estimator_is_called_wrong(monkeypatch, does) -> None:
    net = Net(partial(Waiting, does), 3, TINY_NETS["conv"].batch)
    monkeypatch.setitem(exactness.NETS, "conv", net)
    row = next(exactness.waits("cpu"))()
    assert row["outcome"] == "wrong"
    if does == "waits":
        (site,) = row["waits at"]
        assert site.endswith("×3")
    else:
        assert row["estimator"] == "finite_difference"


@pytest.mark.card
@pytest.mark.parametrize("part", ["nets", "waits", "optimizers", "attention"])
def test_the_step_is_exact_on_a_card(part) -> None:
    found = [row() for row in getattr(exactness, part)("cuda")]
    assert [row for row in found if row["outcome"] not in ("exact", "no wait")] == []


@pytest.mark.card
def test_the_kernels_are_exact_on_a_card() -> None:
    pytest.importorskip("triton", "3.2")
    run = Run("cuda", False, None, math.inf)
    found = [row() for row in kernels.rows(run) if row.func is kernels.parity]
    assert [row for row in found if row["outcome"] != "exact"] == []

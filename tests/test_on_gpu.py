"""The script for a card runs on the CPU, small: every stage, and what becomes of a failure."""

import json
import sys
from functools import partial

import pytest
import torch

import on_gpu
from card import exactness, kernels


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch's profiler
@pytest.mark.parametrize("stage", on_gpu.LIMITS)
def test_every_row_comes_of_something(stage) -> None:
    rows = list(on_gpu.measure(stage, "cpu", True, None))
    assert [row for row in rows if row["outcome"] in ("error", "wrong")] == []
    assert all(row == json.loads(json.dumps(row)) for row in rows)
    wanted = {"exactness": "exact", "kernels": "exact", "cost": "measured", "training": "measured"}
    assert wanted[stage] in {row["outcome"] for row in rows}


def test_a_row_that_fails_says_how_and_the_next_goes_on(monkeypatch) -> None:
    def fail(name: str) -> on_gpu.Row:
        raise ArithmeticError("no such kernel")

    rows = [partial(fail, "conv"), lambda: {"case": "vit", "outcome": "exact"}]
    monkeypatch.setattr(on_gpu, "rows_of", lambda *_: iter(rows))
    failed, other = on_gpu.measure("cost", "cpu", True, None)
    assert failed == {
        "stage": "cost",
        "case": "conv",
        "outcome": "error",
        "reason": "ArithmeticError: no such kernel",
    }
    assert other["outcome"] == "exact"


def test_a_stage_has_its_time_and_the_rows_until_then_are_kept(tmp_path, capsys) -> None:
    row = json.dumps({"stage": "cost", "outcome": "exact"})
    code = f"import threading; print({row!r}, flush=True); threading.Event().wait()"
    command = [sys.executable, "-c", code]
    with (tmp_path / "rows").open("w") as out:
        rows = on_gpu.run("cost", command, 3.0, out)
    assert [row["outcome"] for row in rows] == ["exact", "stopped after 3 s"]
    assert json.loads((tmp_path / "rows").read_text())["outcome"] == "exact"
    on_gpu.print_table(rows)
    assert "1 exact, 1 stopped after 3 s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_to_do(capsys) -> None:
    with pytest.raises(SystemExit):
        on_gpu.main([])
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.card
@pytest.mark.parametrize("part", ["nets", "waits", "optimizers", "attention"])
def test_the_step_is_exact_on_a_card(part) -> None:
    found = [row() for row in getattr(exactness, part)("cuda")]
    assert [row for row in found if row["outcome"] not in ("exact", "no wait")] == []


@pytest.mark.card
def test_the_kernels_are_exact_on_a_card() -> None:
    pytest.importorskip("triton", "3.2")
    found = [row() for row in kernels.rows("cuda", False) if row.func is kernels.parity]
    assert [row for row in found if row["outcome"] != "exact"] == []

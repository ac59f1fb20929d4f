"""Pictures: what is drawn is what was given. How they look is for people."""

import sys

import pytest
import torch

from reweight import ExitLosses, budgeted_curve
from reweight.plots import plot_budgeted_curves, plot_shares, plot_weights


@pytest.fixture
def curve():
    torch.manual_seed(0)
    confidence = torch.rand(200, 3)
    losses = ExitLosses(torch.rand(200, 3), confidence, confidence > 0.4)
    return budgeted_curve(losses, losses, [1e6, 2e6, 4e6])


def test_curves_are_accuracy_against_cost(curve) -> None:
    anytime = {"one": torch.tensor([0.1, 0.2, 0.3])}
    figure = plot_budgeted_curves({"one": curve}, [1e6, 2e6, 4e6], anytime, title="a title")
    line, dots = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[p.cost / 1e6, 100 * p.accuracy] for p in curve]
    assert dots.get_xydata()[:, 0].tolist() == [1, 2, 4]
    assert figure.axes[0].get_title() == "a title"


def test_shares_fill_the_whole(curve) -> None:
    bands = plot_shares(curve).axes[0].collections
    assert [band.get_label() for band in bands] == ["exit 1", "exit 2", "exit 3"]
    tops = bands[-1].get_paths()[0].vertices[:, 1]
    assert tops.max() == pytest.approx(100)


def test_weights_leave_out_what_is_not_finite() -> None:
    losses, weights = torch.rand(10, 2), torch.rand(10, 2)
    losses[3, 0] = torch.inf
    panels = plot_weights(losses, weights).axes
    kept = torch.arange(10) != 3
    for k, panel in enumerate(panels):
        drawn = torch.as_tensor(panel.collections[0].get_offsets())
        torch.testing.assert_close(drawn[:, 0].float(), losses[kept, k])
        torch.testing.assert_close(drawn[:, 1].float(), weights[kept, k])


def test_a_missing_matplotlib_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "reweight.plots")
    with pytest.raises(ImportError, match=r"pip install 'reweight\[plot\]'"):
        import reweight.plots  # noqa: F401

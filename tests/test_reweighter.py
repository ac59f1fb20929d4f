"""What weights must hold to, whatever the network has learned."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cases import make_batch, make_model
from reweight import ExitLosses, MetaReweightStep, SampleReweighter

FORMS = [
    (num_exits, form, average_over)
    for num_exits in (1, 2, 5)
    for form in ("tanh", "sigmoid")
    for average_over in ("exits", "samples", "both")
    if not (num_exits == 1 and average_over == "exits")
]


def make(num_exits, form, average_over, **options) -> SampleReweighter:
    reweighter = SampleReweighter(num_exits, form=form, average_over=average_over, **options)
    return reweighter.double()


@pytest.mark.parametrize(("num_exits", "form", "average_over"), FORMS)
class TestEveryForm:
    def test_weights_average_one(self, num_exits, form, average_over) -> None:
        weights = make(num_exits, form, average_over)(torch.rand(9, num_exits).double() * 3)
        dims = {"exits": 1, "samples": 0, "both": (0, 1)}[average_over]
        means = weights.mean(dims)
        torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-14)
        if form == "sigmoid":
            assert (weights > 0).all()

    def test_permuting_samples_permutes_weights(self, num_exits, form, average_over) -> None:
        reweighter, losses = make(num_exits, form, average_over), torch.rand(9, num_exits).double()
        order = torch.randperm(9)
        torch.testing.assert_close(
            reweighter(losses[order]), reweighter(losses)[order], rtol=1e-13, atol=1e-13
        )

    def test_samples_that_do_not_count_change_no_other_weight(
        self, num_exits, form, average_over
    ) -> None:
        reweighter, losses = make(num_exits, form, average_over), torch.rand(9, num_exits).double()
        valid = torch.arange(9) < 6
        weights = reweighter(ExitLosses(losses, valid=valid))[:6]
        torch.testing.assert_close(weights, reweighter(losses[:6]), rtol=1e-13, atol=1e-13)

    def test_no_gradient_reaches_the_losses(self, num_exits, form, average_over) -> None:
        losses = torch.rand(9, num_exits, dtype=torch.float64, requires_grad=True)
        reweighter = make(num_exits, form, average_over)
        (reweighter(losses) * torch.randn(9, num_exits)).sum().backward()
        assert losses.grad is None
        assert all(p.grad is not None for p in reweighter.parameters())

    def test_survives_saturation(self, num_exits, form, average_over) -> None:
        reweighter = make(num_exits, form, average_over)
        with torch.no_grad():
            reweighter.network[2].bias.fill_(-800.0)  # sigmoid underflows to 0
        weights = reweighter(torch.rand(4, num_exits).double())
        torch.testing.assert_close(weights.mean(), torch.ones(()).double())


def test_tanh_weights_by_hand() -> None:
    reweighter = make(2, "tanh", "exits", strength=0.3)
    losses = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    raw = reweighter.network(losses).tanh()[0].tolist()
    expected = [1 + 0.3 * (r - sum(raw) / 2) for r in raw]
    assert reweighter(losses)[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_bound_of_tanh_weights() -> None:
    reweighter = make(5, "tanh", "exits")
    with torch.no_grad():
        reweighter.network[2].bias.copy_(torch.tensor([-1e3, 1e3, 1e3, 1e3, 1e3]))
    weights = reweighter(torch.rand(1, 5))
    assert weights.min().item() == pytest.approx(1 - 0.8 * 2 * 4 / 5)  # −0.28: negative, as stated


@pytest.mark.parametrize("form", ["tanh", "sigmoid", "predicted"])
def test_strength_zero_gives_exactly_one(form: str) -> None:
    reweighter = SampleReweighter(3, form=form, strength=0)
    assert torch.equal(reweighter(torch.rand(4, 3)), torch.ones(4, 3))
    model = make_model("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in reweighter.double().parameters()]
    step = MetaReweightStep(model, optimizer, reweighter)
    step.backward(make_batch("mlp"), make_batch("mlp", seed=2))
    assert all(map(torch.equal, before, reweighter.parameters())), "nothing is learned"


def test_published_defaults() -> None:
    many, single = SampleReweighter(5), SampleReweighter(1)
    assert (many.form, many.average_over, many.strength) == ("tanh", "exits", 0.8)
    assert (single.form, single.average_over) == ("sigmoid", "samples")
    assert [m.network[0].out_features for m in (many, single)] == [500, 100]


@pytest.mark.parametrize("inputs", ["confidences", "both"])
def test_inputs_choose_what_the_network_sees(inputs: str) -> None:
    reweighter = SampleReweighter(3, inputs=inputs)
    losses, confidence = torch.rand(4, 3), torch.rand(4, 3)
    seen = reweighter(ExitLosses(losses, confidence))
    other = reweighter(ExitLosses(losses + 1, confidence))
    assert torch.equal(seen, other) == (inputs == "confidences")
    with pytest.raises(ValueError, match="must carry confidences"):
        reweighter(losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_have_the_dtype_of_the_losses(dtype) -> None:
    assert SampleReweighter(3)(torch.rand(4, 3, dtype=dtype)).dtype == dtype
    assert copy.deepcopy(SampleReweighter(3)).to(dtype)(torch.rand(4, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_exits": 0}, "num_exits"),
        ({"num_exits": 2, "form": "relu"}, "must be one of tanh, sigmoid, predicted, got 'relu'"),
        ({"num_exits": 2, "average_over": "row"}, "average_over"),
        ({"num_exits": 2, "inputs": "loss"}, "inputs"),
        ({"num_exits": 2, "strength": -0.1}, "strength"),
        ({"num_exits": 2, "num_hidden": 0}, "num_hidden"),
        ({"num_exits": 2, "num_classes": 0}, "`num_classes` must be at least 1"),
        ({"num_exits": 2, "num_features": 0}, "`num_features` must be at least 1"),
        ({"num_exits": 1, "average_over": "exits"}, "every weight 1"),
        ({"num_exits": 1, "form": "tanh"}, "every weight 1"),
    ],
)
def test_bad_options_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleReweighter(**options)


@pytest.mark.parametrize("losses", [torch.rand(4, 2), torch.rand(3), torch.rand(4, 3, 1)])
def test_another_number_of_exits_is_named(losses) -> None:
    with pytest.raises(ValueError, match=r"\[samples, num_exits=3\], got \["):
        SampleReweighter(3)(losses)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(2, 5)).flatmap(
        lambda shape: arrays("float64", shape, elements=st.floats(0, 1e6))
    ),
    st.sampled_from(["tanh", "sigmoid"]),
    st.sampled_from(["exits", "samples", "both"]),
    st.floats(0, 2),
)
def test_weights_average_one_whatever_the_losses(losses, form, average_over, strength) -> None:
    losses = torch.from_numpy(losses)
    options = {"strength": strength} if form == "tanh" else {}
    reweighter = SampleReweighter(
        losses.shape[1], form=form, average_over=average_over, num_hidden=3, **options
    ).double()
    weights = reweighter(ExitLosses(losses))
    means = weights.mean({"exits": 1, "samples": 0, "both": (0, 1)}[average_over])
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-9)


def by_hand(reweighter: SampleReweighter, rows: list[list[float]]) -> torch.Tensor:
    """The raw output of the network, for rows that are written out."""
    first, _, last = reweighter.network
    seen = torch.tensor(rows, dtype=torch.float64)
    return (seen @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (torch.tensor([1, 0, 2]), [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        (torch.tensor([[0.25, 0.75, 0.0]] * 3), [[0.25, 0.75, 0.0]] * 3),
    ],
    ids=["indices", "probabilities"],
)
@pytest.mark.parametrize("with_features", [False, True])
def test_labels_and_features_are_columns_after_the_losses(labels, columns, with_features) -> None:
    losses = torch.tensor([[0.5, 2.0], [1.0, 0.1], [0.3, 0.2]], dtype=torch.float64)
    features = torch.tensor([[7], [8], [9]]) if with_features else None
    options = {"num_classes": 3, "num_features": 1 if with_features else None}
    reweighter = make(2, "sigmoid", "samples", **options)
    labels = labels.double() if labels.is_floating_point() else labels
    rows = [
        [*row.tolist(), *column, *(features[i].tolist() if with_features else [])]
        for i, (row, column) in enumerate(zip(losses, columns, strict=True))
    ]
    positive = by_hand(reweighter, rows).sigmoid()
    weights = reweighter(ExitLosses(losses, labels=labels, features=features))
    torch.testing.assert_close(weights, positive / positive.mean(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("num_exits", "form", "average_over"), FORMS)
def test_what_stands_in_rows_that_do_not_count_is_seen_by_none(
    num_exits, form, average_over
) -> None:
    reweighter = make(num_exits, form, average_over, num_classes=4, num_features=2)
    valid = torch.arange(9) < 6
    labels = torch.randint(4, (9,)).masked_fill(~valid, -100)
    features = torch.randn(9, 2).double()
    losses = torch.rand(9, num_exits).double()
    seen = ExitLosses(losses, valid=valid, labels=labels, features=features)
    spoilt = seen._replace(features=features.masked_fill(~valid.unsqueeze(1), torch.nan))
    alone = ExitLosses(losses[:6], labels=labels[:6], features=features[:6])
    for carried in (seen, spoilt):
        torch.testing.assert_close(
            reweighter(carried)[:6], reweighter(alone), rtol=1e-13, atol=1e-13
        )
    means = reweighter(alone).mean({"exits": 1, "samples": 0, "both": (0, 1)}[average_over])
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-14)
    assert not torch.allclose(reweighter(seen._replace(labels=(labels + 1) % 4)), reweighter(seen))


def test_without_them_nothing_has_changed() -> None:
    torch.manual_seed(0)
    plain = SampleReweighter(3)
    assert repr(plain).count("num_") == 1
    assert plain.network[0].in_features == 3
    losses = torch.rand(4, 3)
    assert torch.equal(plain(losses), plain(ExitLosses(losses, labels=torch.arange(4))))


@pytest.mark.parametrize(
    ("options", "carried", "message"),
    [
        ({"num_classes": 3}, {}, "must carry labels for num_classes=3, got None"),
        ({"num_classes": 3}, {"labels": torch.tensor([0, 3])}, "num_classes=3.* got 4 classes"),
        ({"num_classes": 3}, {"labels": torch.rand(2, 4)}, "num_classes=3.* got 4 classes"),
        ({"num_classes": 3}, {"labels": torch.tensor([0])}, r"one for each of 2 samples, .*\[1\]"),
        ({"num_features": 3}, {}, r"features \[samples, num_features=3\], got None"),
        ({"num_features": 3}, {"features": torch.rand(2, 2)}, r"num_features=3\], got \[2, 2\]"),
        ({}, {"features": torch.rand(2, 2)}, r"num_features=None\], got \[2, 2\]"),
    ],
)
def test_what_the_network_wants_and_does_not_get_is_named(options, carried, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleReweighter(2, **options)(ExitLosses(torch.rand(2, 2), **carried))

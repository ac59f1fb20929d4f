"""The user's model run again: at other parameters, in any form of inputs, outputs and loss."""

import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from cases import make_batch, make_model
from reweight import ExitLosses, exit_cross_entropy
from reweight._passes.forward import ExitForward, call, require_graph
from reweight._passes.snapshots import Beginning


def make(model: nn.Module, exits=None, loss=exit_cross_entropy) -> ExitForward:
    return ExitForward(model, model, exits, loss)


@pytest.mark.parametrize("inputs", [(2.0, 3.0), [2.0, 3.0], {"x": 2.0, "y": 3.0}])
def test_inputs_are_arguments(inputs) -> None:
    assert call(lambda x, y: x - y, inputs) == -1


def test_a_tensor_or_a_named_tuple_is_one_argument() -> None:
    one = ExitLosses(torch.ones(2, 3))
    for inputs in (torch.ones(2), one):
        assert call(lambda *args: args, inputs) == (inputs,)


def test_at_other_parameters_on_copies_of_the_buffers() -> None:
    model, other = make_model("conv_batch_norm"), make_model("conv_batch_norm", seed=7)
    inputs, target = make_batch("conv_batch_norm")
    before = [tensor.clone() for tensor in model.state_dict().values()]
    buffers = dict(other.named_buffers())
    held = [buffer.clone() for buffer in buffers.values()]
    found = make(model).at(
        dict(other.named_parameters()), buffers, inputs, target, lambda exits: exits.losses
    )
    assert all(map(torch.equal, buffers.values(), held))
    assert torch.equal(found, exit_cross_entropy(other(inputs), target).losses)
    assert all(map(torch.equal, model.state_dict().values(), before))
    slopes = torch.autograd.grad(found.sum(), list(other.parameters()))
    assert all(slope.abs().sum() > 0 for slope in slopes if slope.dim() > 1)


def test_tangents_give_the_derivative_along_them() -> None:
    model, (inputs, target) = make_model("mlp"), make_batch("mlp")
    own = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in own.items()}

    def losses(parameters, tangents=None) -> Tensor:
        def then(exits: ExitLosses) -> Tensor:
            return forward_ad.unpack_dual(exits.losses).tangent if tangents else exits.losses

        return make(model).at(parameters, {}, inputs, target, then, tangents=tangents)

    with forward_ad.dual_level(), torch.no_grad():
        found = losses(own, tangents)
    h = 1e-6
    above, below = (
        losses({n: p + sign * h * tangents[n] for n, p in own.items()}) for sign in (1, -1)
    )
    torch.testing.assert_close(found, (above - below) / (2 * h), rtol=1e-7, atol=1e-8)


def test_losses_alone_will_do_and_what_does_not_count_is_zero() -> None:
    model, (inputs, target) = make_model("mlp"), make_batch("mlp")
    forward = make(model, loss=lambda z, y: exit_cross_entropy(z, y).losses)
    plain = forward(inputs, target, beginning=Beginning(model))
    assert plain.confidence is plain.valid is None

    def spoilt(z: list[Tensor], y: Tensor) -> ExitLosses:
        losses = exit_cross_entropy(z, y).losses
        return ExitLosses(losses.index_fill(0, torch.tensor(2), torch.nan), valid=valid)

    valid = torch.arange(len(target)) != 2
    found = make(model, loss=spoilt)(inputs, target, beginning=Beginning(model))
    assert torch.equal(found.losses[2], torch.zeros(3).double())
    assert torch.equal(found.losses[valid], plain.losses[valid])


def test_logits_are_taken_out_of_what_the_model_returns() -> None:
    model, (inputs, target) = make_model("mlp"), make_batch("mlp")
    forward = make(model, exits=lambda outputs: outputs[:2])
    assert forward(inputs, target, beginning=Beginning(model)).losses.shape == (7, 2)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda z, y: "no", TypeError, "must return ExitLosses or a tensor .* got str"),
        (lambda z, y: z[0].sum(), ValueError, r"shape \[samples, exits\].* got \[\]"),
        (lambda z, y: z[0][:0], ValueError, r"got \[0, 4\]"),
    ],
)
def test_what_is_no_loss_is_named(loss, error, message) -> None:
    model, (inputs, target) = make_model("mlp"), make_batch("mlp")
    with pytest.raises(error, match=message):
        make(model, loss=loss)(inputs, target, beginning=Beginning(model))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes yet")
def test_an_error_of_the_model_says_what_it_was_given() -> None:
    model = make_model("mlp")
    with pytest.raises(RuntimeError) as raised:
        make(model)(torch.ones(2, 9), torch.ones(2), beginning=Beginning(model))
    assert "got the inputs of a batch (inputs, target): torch.float32 [2, 9]" in str(
        raised.value.__notes__
    )


def test_losses_without_a_graph_are_refused() -> None:
    losses = ExitLosses(torch.ones(2, 3, requires_grad=True) * 1)
    assert require_graph(losses) is losses
    with pytest.raises(ValueError, match="losses without a graph"):
        require_graph(ExitLosses(torch.ones(2, 3)))

"""A twin has the structure of an optimizer, around parameters of its own."""

import threading
from collections import defaultdict, deque

import torch
from torch import nn, optim
from torch.optim.lr_scheduler import ExponentialLR

from reweight._optimizers.twin import part, twin
from steps import ByMemory, Lookahead, Noisy, Taken


def alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data


def test_parameters_share_their_memory_and_nothing_else() -> None:
    taken = Taken(optim.Adam)
    new = twin(taken.optimizer, {id(taken.parameters[0]): taken.gradients[0]}, alias)
    for old in taken.parameters:
        q = new.parameters[id(old)]
        assert q is not old
        assert q.data_ptr() == old.data_ptr()
        assert new.optimizer.state[q]["exp_avg"] is not taken.optimizer.state[old]["exp_avg"]
        for name, value in taken.optimizer.state[old].items():
            assert new.optimizer.state[q][name].data_ptr() == value.data_ptr()
    assert new.parameters[id(taken.parameters[0])].grad is not None
    assert new.parameters[id(taken.parameters[1])].grad is None
    new.optimizer.param_groups[0]["lr"] = 7.0
    new.optimizer.state.clear()
    assert taken.optimizer.param_groups[0]["lr"] != 7.0
    assert len(taken.optimizer.state) == len(taken.parameters)


def test_a_gradient_that_is_not_named_stays() -> None:
    taken = Taken(optim.SGD)
    taken.parameters[0].grad = torch.ones(4, 3).double()
    new = twin(taken.optimizer, {id(taken.parameters[1]): None}, alias)
    assert torch.equal(new.parameters[id(taken.parameters[0])].grad, taken.parameters[0].grad)
    assert new.parameters[id(taken.parameters[1])].grad is None


def test_state_by_id_moves_to_the_ids_of_the_twin() -> None:
    taken = Taken(ByMemory)
    new = twin(taken.optimizer, {}, alias)
    assert set(new.optimizer.kept) == {id(q) for q in new.parameters.values()}
    assert new.optimizer.calls == [3]
    assert new.optimizer.calls is not taken.optimizer.calls


def test_an_optimizer_inside_is_a_twin_too() -> None:
    taken = Taken(lambda parameters: Lookahead(optim.Adam(parameters)))
    new = twin(taken.optimizer, {}, alias)
    assert new.optimizer.optimizer is not taken.optimizer.optimizer
    assert new.optimizer.param_groups is new.optimizer.optimizer.param_groups
    assert set(new.optimizer.slow) == set(new.parameters.values())


def test_a_generator_is_copied_as_it_is() -> None:
    taken = Taken(Noisy)
    new = twin(taken.optimizer, {}, alias)
    ours, theirs = new.optimizer.generator, taken.optimizer.generator
    assert ours is not theirs
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_containers_keep_their_kinds_and_what_cannot_be_copied_is_shared() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.lock = threading.Lock()
    optimizer.kinds = {"d": defaultdict(list, {1: [p]}), "q": deque([p], 3), "t": (p, {p})}
    optimizer.again = optimizer.kinds
    new = twin(optimizer, {}, alias)
    (q,) = new.parameters.values()
    assert new.optimizer.lock is optimizer.lock
    assert new.optimizer.again is new.optimizer.kinds
    kinds = new.optimizer.kinds
    assert kinds["d"][1][0] is q
    assert kinds["d"][2] == []
    assert kinds["q"][0] is q
    assert kinds["q"].maxlen == 3
    assert kinds["t"][0] is q
    assert q in kinds["t"][1]


def test_neither_hooks_nor_what_schedulers_put_there_are_called() -> None:
    optimizer = optim.NAdam([nn.Parameter(torch.ones(2))])
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scheduler = ExponentialLR(optimizer, 0.5)
    new = twin(
        optimizer,
        {id(p): torch.ones(2) for p in optimizer.param_groups[0]["params"]},
        lambda tensor: tensor.clone(),
    )
    new.step()
    assert not calls
    assert "step" not in vars(new.optimizer)
    assert scheduler.optimizer is optimizer


def test_a_part_has_its_own_groups_and_state_of_what_it_holds() -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([("p", p), ("q", q)], lr=0.1, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = optimizer.state[q]["momentum_buffer"] = torch.ones(1)
    few = part(optimizer, {id(q)})
    assert few.param_groups == [{**few.defaults, "params": [q]}]
    assert list(few.state) == [q]
    assert few.state[q] is optimizer.state[q]
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == 2

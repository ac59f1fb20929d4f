"""What a reweighted step costs, by this library and by others, in plain steps.

A plain step is zero_grad, forward, backward and optimizer.step on the train batch, of the same net
and optimizer, with the cross-entropy of PyTorch. Time: all contestants take turns in one process,
and the median over the rounds of each one's ratio to the plain step of the same round is printed.
Memory: each contestant in a process of its own, peak resident set above what it was before the
first step.

    python benchmarks/step_cost.py            # the table; about 40 minutes on two cores
    python benchmarks/step_cost.py --nets conv --optimizers sgd --rounds 3      # 2 minutes
    python benchmarks/step_cost.py --profile  # where the time of a step goes; about 3 minutes
    python benchmarks/step_cost.py --compare HEAD~3    # here over there, in turns, with quartiles

``pytest benchmarks/test_peers.py`` asserts that the contestants train the same.
"""

import argparse
from itertools import product

import torch

from contestants import CONTESTANTS, UNSUPPORTED, contestant
from measure import median_ratios, peak_memory, peak_of, seconds_by_turns
from nets import NETS, OPTIMIZERS, TINY_NETS
from peers import PEERS
from phases import print_profile
from revisions import print_comparison

NOTES = {
    "published recipe": "a, b",
    "torchopt Meta*": "b, c",
    "higher": "b, d",
    "ours, unrolled": "e",
    "ours, half of the parameters move": "f",
}
LEGEND = """\
of peer: time over that of the fastest peer with this net and optimizer.
a: as published, a step of momentum SGD whatever the optimizer.
b: attention by plain operations in the pass that is differentiated twice, fused elsewhere.
c: the real optimizer's state is handed over at each step; eps_root against NaN with AdamW.
d: higher 0.2.1 has no AdamW.
e: attention by plain operations throughout.
f: the last ones, in the order of the model, that hold half of all entries."""


def peak_of_steps(net: str, optimizer_name: str, name: str) -> int:
    """Peak resident set above the start of two steps, in kB; to be run in a process of its own."""
    tiny, _ = contestant(TINY_NETS[net], optimizer_name, name)
    tiny()  # loads the code that a step needs, which is not what is asked for
    step, _ = contestant(net, optimizer_name, name)
    return peak_of(step)


def print_table(net: str, optimizer_name: str, names: list[str], num_rounds: int) -> None:
    """The rows of one net and optimizer."""
    names = [name for name in names if (name, optimizer_name) not in UNSUPPORTED]
    memory = {name: peak_memory(peak_of_steps, net, optimizer_name, name) for name in names}
    contestants = {name: contestant(net, optimizer_name, name) for name in names}
    ratios = median_ratios(seconds_by_turns(contestants, num_rounds), "plain")
    fastest = min((ratios[name] for name in PEERS if name in ratios), default=float("nan"))
    for name in names[1:]:
        print(
            f"{net:>7} {optimizer_name:>6}  {name:<33} {ratios[name]:>5.2f} "
            f"{ratios[name] / fastest:>8.2f} {memory[name] / memory['plain']:>12.2f}"
            f"  {NOTES.get(name, '')}",
            flush=True,
        )


def main() -> None:
    """Print one table of all nets and optimizers, or the profiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--compare", metavar="REVISION", help="time over that of another revision")
    settings = parser.parse_args()
    names = ["plain", *(name for name in settings.contestants if name != "plain")]
    threads = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    if settings.compare:
        print(f"{threads}; a step at {settings.compare} = 1, median (quartiles)")
        for net, optimizer in product(settings.nets, settings.optimizers):
            print_comparison(settings.compare, net, optimizer, "ours, forward", settings.rounds)
        return
    print(f"{threads}; plain step = 1")
    if not settings.profile:
        print(f"{'net':>7} {'':>6}  {'':<33} {'time':>5} {'of peer':>8} {'peak memory':>12}  notes")
    for net in settings.nets:
        for optimizer_name in settings.optimizers:
            if settings.profile:
                print_profile(net, optimizer_name, settings.rounds)
            else:
                print_table(net, optimizer_name, names, settings.rounds)
    if not settings.profile:
        print(LEGEND)


if __name__ == "__main__":
    main()

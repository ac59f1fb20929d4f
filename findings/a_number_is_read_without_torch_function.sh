#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): a tensor without dimensions, of a subclass, that stands where a function wants a number
# (alpha= of torch.add, the fill value of torch.full) is read as that number, and its __torch_function__ is not called.
# As an ordinary argument of the same function it is called. So a subclass that stands for a value which is still to be
# computed hands out whatever lies in its memory. Seen on 2026-11-29:
#   as an argument: asked 1 time, 7.0
#   as alpha: asked 0 times, 3.0
#   as the value to fill with: asked 0 times, 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - << 'EOF'
import torch


class Seven(torch.Tensor):
    """Holds 2, and says 7 to whoever asks."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked += 1
        given = [torch.tensor(7) if isinstance(each, cls) else each for each in args]
        named = {k: torch.tensor(7) if isinstance(v, cls) else v for k, v in (kwargs or {}).items()}
        return func(*given, **named)


def look(name, function):
    Seven.asked = 0
    result = function(torch.tensor(2).as_subclass(Seven)).item()
    print(f"{name}: asked {Seven.asked} time{'' if Seven.asked == 1 else 's'}, {result}")
    return Seven.asked, result


one, zero = torch.ones(()), torch.zeros(())
seen = [
    look("as an argument", lambda seven: torch.add(zero, seven)),
    look("as alpha", lambda seven: torch.add(one, one, alpha=seven)),
    look("as the value to fill with", lambda seven: torch.full((), seven, dtype=torch.float32)),
]
assert seen == [(1, 7.0), (0, 3.0), (0, 2.0)], "it has changed"
EOF

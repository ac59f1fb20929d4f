#!/usr/bin/env bash
# Accelerate 1.15.0 (PyTorch 2.13.0): FSDP that is asked for on CPU processes is left out without a word. The model
# is wrapped in DistributedDataParallel, with all parameters whole on each rank. fully_shard itself works there.
# Seen: "FSDP asked for: DistributedType.MULTI_CPU, DistributedDataParallel, Parameter".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
cat > "$folder/rank.py" << 'EOF'
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
kinds = type(model).__name__, type(next(model.parameters())).__name__
seen = ", ".join(["FSDP asked for: " + str(accelerator.distributed_type), *kinds])
if accelerator.is_main_process:
    print(seen)
wanted = "FSDP asked for: DistributedType.MULTI_CPU, DistributedDataParallel, Parameter"
assert seen == wanted, "it has changed: " + seen
accelerator.end_training()
EOF
"$folder/bin/python" -m torch.distributed.run --standalone --nproc-per-node=2 "$folder/rank.py"

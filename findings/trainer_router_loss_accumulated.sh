#!/usr/bin/env bash
# transformers 5.23.0: the Trainer's gradient accumulation makes the router loss of a mixture of experts as many times
# larger as batches are accumulated. Cross-entropy is divided by the tokens of all of them, the router loss by nothing.
# Below, four equal sequences train as one batch and as four of one: only without router losses is that the same.
# Seen: "gradient of 4 accumulated over that of 1 batch: cross-entropy 1.00, router loss 4.00".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy
"$folder/bin/python" - "$folder" << 'EOF'
import sys

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments


def router_gradient(coefficient: float, accumulate: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=coefficient,
    ))
    found = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            name = "model.layers.0.mlp.gate.weight"
            found.append(dict(model.named_parameters())[name].grad.clone())

    tokens = torch.arange(6) + 3
    row = {"input_ids": tokens, "labels": tokens}
    arguments = TrainingArguments(
        sys.argv[1] + "/out", max_steps=1, per_device_train_batch_size=4 // accumulate, use_cpu=True,
        gradient_accumulation_steps=accumulate, max_grad_norm=0, report_to="none", disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=[row] * 4, callbacks=[Look()]).train()
    return found[0]


def router_part(accumulate: int) -> torch.Tensor:
    return router_gradient(10.0, accumulate) - router_gradient(0.0, accumulate)


plain = router_gradient(0.0, 4).norm() / router_gradient(0.0, 1).norm()
router = router_part(4).norm() / router_part(1).norm()
seen = f"gradient of 4 accumulated over that of 1 batch: cross-entropy {plain:.2f}, router loss {router:.2f}"
print(seen)
wanted = "gradient of 4 accumulated over that of 1 batch: cross-entropy 1.00, router loss 4.00"
assert seen == wanted, "it has changed"
EOF

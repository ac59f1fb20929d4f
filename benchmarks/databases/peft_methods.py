"""The methods of peft, each on a small Llama whose own parameters are frozen."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from databases.architectures import NUM_TOKENS, VOCABULARY, small_config
from databases.judge import Case
from databases.oracles import NUM_SAMPLES, Training

TARGETS = ("q_proj", "v_proj")
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1] * 4},
    "FOURIERFT": {"n_frequency": 16},
    "IA3": {"feedforward_modules": ["v_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"n_tasks": 2},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4, 5]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "WAVEFT": {"n_frequency": 16},
}
"""What a method cannot do without, or that its default is too large for."""
TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")
"""Want to be told the task of each sample."""


def entries() -> Mapping[str, str]:
    """All of them, by name."""
    import transformers
    import transformers.models.llama.modeling_llama  # loads what all share, before processes fork
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    return {kind.value: kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def cases(method: str, dtype: torch.dtype) -> Iterator[Case]:
    """In training mode, a little away from where it begins, where many have a derivative of 0."""
    yield Case("causal_lm", partial(_training, method))


def _config(method: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    fields = {field.name for field in dataclasses.fields(config_class)}
    known = {
        "target_modules": list(TARGETS),
        "num_virtual_tokens": 4,
        "adapter_len": 4,
        "adapter_layers": 1,
        "encoder_hidden_size": 16,
        "r": 4,
    }
    options = {name: value for name, value in known.items() if name in fields}
    return config_class(**{**options, "task_type": "CAUSAL_LM", **OPTIONS.get(method, {})})


def _training(method: str, dtype: torch.dtype) -> Training:
    import transformers
    import transformers.models.llama.modeling_llama  # loads what all share, before processes fork
    from peft import get_peft_model

    config = small_config(transformers.LlamaConfig)
    config.use_cache, config.pad_token_id = False, 0
    model = transformers.LlamaForCausalLM(config)
    model = get_peft_model(model, _config(method)).to(dtype).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.02 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    batches = []
    for _ in range(2):
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (NUM_SAMPLES, NUM_TOKENS))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if method in TASKS:
            inputs["task_ids"] = torch.arange(NUM_SAMPLES) % 2
        batches.append((inputs, torch.randint(VOCABULARY, (NUM_SAMPLES,))))

    def exits(outputs: Any) -> Tensor:
        logits: Tensor = outputs.logits[:, -1]
        return logits

    return Training(model, torch.optim.SGD(trained, lr=0.01), *batches, exits)

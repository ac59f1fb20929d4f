"""Architectures of transformers, each made small by its configuration; nothing is downloaded."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from databases.judge import Case
from databases.oracles import NUM_SAMPLES, Training

NUM_TOKENS, NUM_LABELS, VOCABULARY = 7, 3, 64
LAYERS, HEADS, WIDTH = 2, 4, 32
TASKS = (
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
)

SMALL = {
    LAYERS: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_hidden_groups mamba_d_conv d_conv "
        "conv_kernel num_experts_per_tok num_experts_per_token moe_topk moe_k top_k "
        "router_top_k num_key_value_heads num_kv_heads n_groups mamba_n_groups "
        "num_conv_pos_embedding_groups temporal_patch_size tubelet_size time_step_rank "
        "topk_group n_group top_k_experts"
    ),
    HEADS: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_experts "
        "decoder_attention_heads num_local_experts n_routed_experts moe_num_experts "
        "linear_num_key_heads linear_num_value_heads num_frames state_size mamba_d_state "
        "index_n_heads rotary_dim"
    ),
    WIDTH // HEADS: (
        "head_dim d_kv kv_channels qk_nope_head_dim qk_rope_head_dim mamba_n_heads v_head_dim "
        "mamba_d_head linear_key_head_dim linear_value_head_dim index_head_dim "
        "attention_head_size patch_size"
    ),
    WIDTH // 2: "kv_lora_rank q_lora_rank num_mel_bins sliding_window attention_window",
    WIDTH: (
        "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim emb_dim embedding_size "
        "output_dim hidden_dim encoder_hidden_size decoder_hidden_size d_embed conv_dim_out "
        "lru_width attention_hidden_size projection_dim classifier_proj_size image_size "
        "img_size spec_size"
    ),
    2 * WIDTH: (
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size mamba_intermediate_size d_inner "
        "max_position_embeddings n_positions max_source_positions max_target_positions "
        "ffn_dim_multiplier_to moe_ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp "
        "mlp_dim max_length"
    ),
    VOCABULARY: "vocab_size vocab_size_per_layer_input text_vocab_size",
}
"""What a configuration calls the things that are to be small."""
SIZE_OF = {name: size for size, names in SMALL.items() for name in names.split()}
DERIVED = ("head_dim", "num_key_value_heads")
"""Sizes that follow from others where they are not given, but not everywhere."""
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": HEADS},
    "esm": {"vocab_size": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"languages": ["en"], "default_language": "en"},
}


class Architecture(NamedTuple):
    """A type of model, and what it is asked to do."""

    model_type: str
    task: str


def entries() -> Mapping[str, Architecture]:
    """Every type once: as a language model if it is one, else as a classifier."""
    import transformers
    import transformers.models.llama.modeling_llama  # loads what all share, before processes fork
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    found: dict[str, Architecture] = {}
    for task in TASKS:
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            found.setdefault(model_type, Architecture(model_type, task))
    return found


def cases(architecture: Architecture, dtype: torch.dtype) -> Iterator[Case]:
    """As it comes: in training mode, with the attention and experts that are the default."""
    yield Case(architecture.task.lower(), partial(_training, architecture))


def small_config(config_class: Any, **more: Any) -> Any:
    """A configuration with few layers, heads and channels; what it does not say is the default."""
    default = config_class()
    options: dict[str, Any] = {}
    written = default.to_dict()
    for name in {**written, **getattr(config_class, "attribute_map", {})}:
        value = written[name] if name in written else getattr(default, name, None)
        sub_class = config_class.sub_configs.get(name)
        if hasattr(sub_class, "sub_configs") and value is not None:
            options[name] = small_config(sub_class).to_dict()
        elif name in SIZE_OF and _is_number(value):
            options[name] = min(value, SIZE_OF[name])
        elif name in DERIVED and value is None:
            options[name] = SIZE_OF[name]
        elif isinstance(value, list | tuple) and value and all(map(_is_number, value)):
            options.update(_small_list(name, list(value)))
        elif name in ("mrope_section", "layer_types", "mlp_layer_types"):
            continue
    heads = written.get("num_attention_heads")
    if heads is not None and written.get("num_key_value_heads") == heads:
        # Not shared by several, which some rely on.
        options["num_key_value_heads"] = options["num_attention_heads"]
    more = {**SPECIAL.get(default.model_type, {}), **more}
    return config_class(**{**options, **more})


def _small_list(name: str, values: list[int]) -> dict[str, list[int]]:
    """Of the stages of a vision or audio encoder: channels that grow, a layer in each."""
    if name in ("depths", "num_blocks", "layers"):
        return {name: [1] * len(values)}
    if name in ("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_sizes", "dims"):
        return {name: [8 * 2**i for i in range(len(values))]}
    if name in ("num_attention_heads", "num_heads"):
        return {name: [min(value, 2) for value in values]}
    if name == "conv_dim":
        return {name: [WIDTH] * len(values)}
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _training(architecture: Architecture, dtype: torch.dtype) -> Training:
    import transformers
    import transformers.models.llama.modeling_llama  # loads what all share, before processes fork
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{architecture.task}_MAPPING_NAMES")
    class_name = names[architecture.model_type]
    class_name = class_name if isinstance(class_name, str) else class_name[0]
    model_class = getattr(transformers, class_name)
    config = small_config(model_class.config_class, num_labels=NUM_LABELS)
    for token, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        setattr(config, name, token)
    config.use_cache, config.decoder_start_token_id = False, 0
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the default has no float64 at all
    model = model_class(config).to(dtype).train()
    is_language_model = architecture.task == "CAUSAL_LM"
    batches = []
    for _ in range(2):
        num_classes = VOCABULARY if is_language_model else NUM_LABELS
        target = torch.randint(num_classes, (NUM_SAMPLES,))
        batches.append((_inputs(model, config, dtype), target))

    def exits(outputs: Any) -> Tensor:
        logits: Tensor = outputs.logits
        return logits[:, -1] if is_language_model else logits

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Training(model, optimizer, *batches, exits)


def _inputs(model: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    name = model.main_input_name
    if name == "input_ids":
        tokens = torch.randint(3, VOCABULARY, (NUM_SAMPLES, NUM_TOKENS))
        tokens[:, -1] = 2  # sequence-to-sequence classifiers want the end marked
        return {name: tokens}
    if name == "input_values" and hasattr(config, "conv_dim"):
        shape: tuple[int, ...] = (1600,)
    elif name in ("input_values", "input_features"):
        frames, bins = getattr(config, "max_length", 2 * WIDTH), getattr(config, "num_mel_bins", 16)
        shape = (bins, 2 * frames) if "whisper" in config.model_type else (frames, bins)
    else:
        size = getattr(config, "image_size", 2 * WIDTH)
        size = size if isinstance(size, int) else size[0]
        shape = (getattr(config, "num_channels", 3), size, size)
        if hasattr(config, "num_frames"):
            shape = (config.num_frames, *shape)
    return {name: torch.randn((NUM_SAMPLES, *shape), dtype=torch.float64).to(dtype)}

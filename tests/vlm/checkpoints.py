"""Checkpoints in hub layout to load: the nano model in parts, a tiny mixture of experts."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm import nano
from vlm.templates import GLM, QWEN

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": ROPE,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 64,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}
TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}


def sharded(folder: Path) -> Path:
    """The nano model, its weights in several files, with all its other files."""
    from transformers import Qwen3VLForConditionalGeneration

    Qwen3VLForConditionalGeneration.from_pretrained(nano.folder()).save_pretrained(folder, max_shard_size="4MB")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano.folder() / name, folder / name)
    return folder


def experts(folder: Path) -> Any:
    """Save a tiny random mixture of experts, whose head is not tied, and give it back."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    text = {**TEXT, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    text["tie_word_embeddings"] = False
    config = Qwen3VLMoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **TOKENS)
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


class RandomModel(Protocol):
    """Writes a model of a kind, "dense" or "sparse", its head tied or not, once a session."""

    def __call__(self, kind: str, *, tied: bool) -> Path: ...


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}


def random_model(folder: Path, kind: str, *, tied: bool) -> Path:
    """Write a model of the nano model's sizes with random weights: dense, or with experts in all layers but one."""
    import transformers

    sizes = transformers.AutoConfig.from_pretrained(nano.folder())
    parts = {name: getattr(sizes, name).to_dict() for name in ("text_config", "vision_config")}
    for part in parts.values():
        part.pop("model_type")
    parts["text_config"] |= {
        "tie_word_embeddings": tied,
        **({**EXPERTS, "mlp_only_layers": [1]} if kind == "sparse" else {}),
    }
    ids = {key: value for key, value in sizes.to_dict().items() if key.endswith("_token_id")}
    name = "Qwen3VLMoe" if kind == "sparse" else "Qwen3VL"
    config = getattr(transformers, f"{name}Config")(**parts, tie_word_embeddings=tied, **ids)
    model, generator = (
        getattr(transformers, f"{name}ForConditionalGeneration")(config),
        torch.Generator().manual_seed(0),
    )
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, std=0.09, generator=generator)
        assert tensor.isfinite().all(), name
    model.save_pretrained(folder)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano.folder() / name, folder / name)
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy in which files can be damaged."""
    return Path(shutil.copytree(folder, to / "copy", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def with_weights(folder: Path, change: Mapping[str, Tensor | None]) -> None:
    """Put tensors into model.safetensors, or (None) take them out."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors"), **change}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def with_config(folder: Path, **change: object) -> None:
    """Set entries of config.json, or (None) take them out."""
    written = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not None}))


SIZES: dict[str, Any] = {
    **{"vocab_size": 4096, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "eos_token_id": 4072},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
LLAMA3 = {  # the angles of Llama 3.1, stretched from 16 positions
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LONGROPE = {  # the angles of longer texts are other ones
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64},
    **{"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]},
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {  # name → transformers' class without its end, and what is its own
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, **EXPERTS, "moe_intermediate_size": 24}),
}

DEEPSEEK = {  # a dense layer and one of experts, latent queries and keys
    **{"rope_parameters": YARN, "first_k_dense_replace": 1, "moe_intermediate_size": 24, "num_key_value_heads": 4},
    **{"q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
}
SLIDING = {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
RECURRENT = {  # a layer that keeps a state, and one that keeps keys
    **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 32, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 8},
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}
STOCKS: dict[str, tuple[str, dict[str, Any]]] = {  # of no row of FAMILIES
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "gemma3": ("Gemma3", {**SLIDING, "query_pre_attn_scalar": 16, "final_logit_softcapping": 20.0}),
    "qwen3_5_text": ("Qwen3_5", RECURRENT),
}
UNPACKED: dict[str, tuple[str, dict[str, Any]]] = {  # beyond what the row of the type computes; one without a row
    "windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "windows of experts": (
        "Qwen3Moe",
        {"head_dim": 16, **EXPERTS, "moe_intermediate_size": 24, "use_sliding_window": True, "sliding_window": 24},
    ),
    "long angles": ("Llama", {"rope_parameters": LONGROPE}),
    "dynamic angles": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "gpt_neox": (
        "GPTNeoX",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8, "out_hidden_size": 48}
SPARSE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # and what is its text model's and its tower's own
    "qwen3_5": ("Qwen3_5", RECURRENT, {"num_position_embeddings": 64}),
    "qwen3_5_moe": ("Qwen3_5Moe", RECURRENT | SPARSE, {"num_position_embeddings": 64}),
    "glm4v": (
        "Glm4v",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
        {"image_size": 64},
    ),
}


GLM_TEMPLATE = """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}\
<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def text_model(folder: Path, name: str) -> Path:
    """Write a random text model of TEXTS, STOCKS or UNPACKED with the nano model's tokenizer."""
    import transformers

    kind, own = (TEXTS | STOCKS | UNPACKED)[name]
    found = getattr(transformers, f"{kind}ForCausalLM")
    return saved(found(found.config_class(**SIZES | own)), folder)


def seeing_model(folder: Path, name: str) -> Path:
    """Write a random model of SEEING with the nano model's tokenizer and image processor; GLM's with its own marks of
    images and its own turns."""
    import transformers

    kind, text, vision = SEEING[name]
    found = getattr(transformers, f"{kind}ForConditionalGeneration")
    marks = ("image_start", "image_end") if name == "glm4v" else ("vision_start", "vision_end")
    ids = dict(zip((f"{mark}_token_id" for mark in (*marks, "image", "video")), (4079, 4080, 4082, 4083), strict=True))
    config = found.config_class(text_config={**SIZES, **text}, vision_config=TOWER | vision, **ids)
    saved(found(config), folder)
    shutil.copyfile(nano.folder() / "preprocessor_config.json", folder / "preprocessor_config.json")
    if name == "glm4v":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            text = (folder / file).read_text(encoding="utf-8")
            for ours, theirs in zip(QWEN, GLM, strict=True):
                text = text.replace(ours, theirs)
            (folder / file).write_text(text, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(GLM_TEMPLATE)
    return folder


def saved(model: Any, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if tensor.ndim > 1 or key.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.15, generator=generator)
        elif key.endswith("A_log"):  # how fast a state decays: at random otherwise, and too fast to compare gradients
            tensor.uniform_(0, 1, generator=generator)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano.folder() / file, folder / file)
    return folder

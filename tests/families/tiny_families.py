"""Tiny random models of many architectures, with a tokenizer of letters and a chat template of the family's shape."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = (
    *("<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>", "<|user|>", "<|assistant|>"),
    *("[INST]", "[/INST]", "<|head|>", "<|/head|>", "<think>", "</think>"),
)
ASK = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
    + "<|im_start|> assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen3": (
        "{% for m in messages %}<|im_start|> {{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        + ASK
        + "<|im_start|> assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama3": (
        "<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content }}<|eot|>{% endfor %}"
        + ASK
        + "<|head|>assistant<|/head|>\n\n{% endif %}",
        "<|eot|>",
    ),
    "gemma": (
        "<s>{% for m in messages %}<start_of_turn> {{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + ASK + "<start_of_turn> model\n{% endif %}",
        "<end_of_turn>",
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}",
        "</s>",
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + ASK
        + "<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
    "harmony": (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
        "{% endfor %}" + ASK + "<|start|>assistant{% endif %}",
        "<|return|>",
    ),
    "falcon": (
        "{% for m in messages %}{{ 'User:' if m.role == 'user' else 'Assistant:' }} {{ m.content }}</s>\n{% endfor %}"
        + ASK
        + "Assistant: {% endif %}",
        "</s>",
    ),
}
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
}
EXPERTS = {"num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8}
# family -> (configuration class, what is its own, template)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {}, "llama3"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, "chatml"),
    "qwen3": ("Qwen3Config", {}, "qwen3"),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24, **EXPERTS}, "qwen3"),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0, **WINDOW}, "gemma"),
    "gemma3_text": ("Gemma3TextConfig", {"query_pre_attn_scalar": 8, **WINDOW}, "gemma"),
    "gemma3": ("Gemma3Config", {"query_pre_attn_scalar": 8, **WINDOW}, "gemma"),  # with a vision tower
    "mistral": ("MistralConfig", WINDOW, "mistral"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None, **EXPERTS}, "mistral"),
    "phi3": ("Phi3Config", {}, "phi3"),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}, "chatml"),
    "olmo2": ("Olmo2Config", {}, "phi3"),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, **EXPERTS, **WINDOW}, "harmony"),
    "smollm3": ("SmolLM3Config", {}, "chatml"),
    "falcon": (
        "FalconConfig",
        {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
        "falcon",
    ),
    "gpt2": ("GPT2Config", {}, "chatml"),
}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text, end = TEMPLATES[template]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token=end
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[4:])})
    fast.chat_template = text
    return fast


def config(family: str, words: PreTrainedTokenizerFast) -> Any:
    kind, own, _ = FAMILIES[family]
    ids = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": words.eos_token_id}
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **ids)
    if family == "gemma3":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = {**sizes, "image_size": 28, "patch_size": 14}
        return transformers.Gemma3Config(
            text_config={**SIZES, **own, **ids}, vision_config=vision, mm_tokens_per_image=4
        )
    sizes = {name: size for name, size in SIZES.items() if (family, name) != ("falcon", "head_dim")}
    return getattr(transformers, kind)(**{**sizes, **own, **ids})


def save(family: str, folder: Path) -> Path:
    """A random model of a family, with its tokenizer. Its output is sharpened, so that its answers differ."""
    words = tokenizer(FAMILIES[family][2])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, words)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter *= 3
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder

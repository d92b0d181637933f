"""A tiny Ministral 3 model directory for tests: tokenizer, chat template, configurations; weights of a few bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CALLS]",
    "<pad>",
)

# In the manner of the hub's Mistral templates: strict about roles, blocks sorted where there are two, a default system
# prompt with the date where none is given.
HUB_LIKE_TEMPLATE = """{%- set standard = 'Today is ' + strftime_now('%Y-%m-%d') + '.' %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set others = messages[1:] %}
{%- else %}
    {%- set system = standard %}
    {%- set others = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- for message in others %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}
            {%- set blocks = message['content'] %}
            {%- if blocks | length == 2 %}{%- set blocks = blocks | sort(attribute='type') %}{%- endif %}
            {%- for block in blocks %}
                {%- if block['type'] == 'text' %}
                    {{- block['text'] }}
                {%- elif block['type'] in ['image', 'image_url'] %}
                    {{- '[IMG]' }}
                {%- else %}
                    {{- raise_exception('only text and images') }}
                {%- endif %}
            {%- endfor %}
            {{- '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only user, system and assistant, got ' + message['role']) }}
    {%- endif %}
{%- endfor %}"""


def make_tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """A byte-level tokenizer without merges: every byte is a token, any text survives the round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id_ for id_, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def make_model_directory(
    folder: Path,
    *,
    longest_edge: int | None = 112,
    template: str | None = HUB_LIKE_TEMPLATE,
    special: tuple[str, ...] = SPECIAL,
    eos: Any = 2,
) -> Path:
    """Writes the directory and returns it; patch 14, merge 2."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(special).save(str(folder / "tokenizer.json"))
    write_json(
        folder,
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    write_json(
        folder,
        "config.json",
        {
            "model_type": "mistral3",
            "architectures": ["Mistral3ForConditionalGeneration"],
            "image_token_index": 5,
            "spatial_merge_size": 2,
            "vision_config": {"model_type": "pixtral", "patch_size": 14, "image_size": 140},
            "text_config": {"model_type": "ministral3", "eos_token_id": 2},
        },
    )
    write_json(folder, "generation_config.json", {"eos_token_id": eos})
    processor: dict[str, Any] = {
        "image_processor": {
            "image_processor_type": "PixtralImageProcessorFast",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "do_center_crop": None,
            "crop_size": None,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "patch_size": 14,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "data_format": "channels_first",
            "device": None,
            "return_tensors": None,
        },
        "patch_size": 14,
        "spatial_merge_size": 2,
        "processor_class": "PixtralProcessor",
    }
    if longest_edge is not None:
        processor["image_processor"]["size"] = {"longest_edge": longest_edge}
    write_json(folder, "processor_config.json", processor)
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    save_file({"a.weight": weights, "b.weight": weights + 1}, str(folder / "model.safetensors"))
    return folder

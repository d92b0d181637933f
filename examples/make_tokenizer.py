"""Makes the small model's tokenizer: a byte-level BPE with Mistral's special tokens at Mistral's ids.

Any text round-trips, since every byte has a token of its own; most words of the captions and of common prompts
have one token each. Nothing here is random: the same corpus gives the same files.
"""

from __future__ import annotations

from pathlib import Path

from pictures import all_captions
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 640  # 20 special tokens, 256 bytes, and merges

# Mistral's ids: a reader of the 3B's token ids finds the same numbers here. The ones that a captioner never meets
# (tools, fill-in-the-middle) keep their places as <SPECIAL_n>.
_NAMED = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
}
SPECIAL_TOKENS = tuple(_NAMED.get(index, f"<SPECIAL_{index}>") for index in range(20))
IMG, IMG_BREAK, IMG_END, PAD = 10, 12, 13, 11

PROMPTS = (
    "Describe this image.",
    "Describe the image.",
    "Describe this picture in a few words.",
    "What is in the picture?",
    "What do you see in this image?",
    "What is shown here?",
    "Caption:",
    "Write a caption for this image.",
    "Write a short caption.",
    "Tell me what is on this picture.",
    "Image description:",
    "What does this image show?",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You describe pictures.",
    "You write short and exact captions.",
    "Answer with one caption and nothing else.",
)
# Plain English, so that prompts other than the ones above cost few tokens, too.
_ENGLISH = """
Please look at this image and describe what you see. How many objects are there, and what colour is each of them?
Name the shape, the colour and the place of every object in the picture. Which digit is written here? Is there a number
in this image, and if so, which one? Give me one short sentence about the picture, please. What can you tell me about
this photo? Be brief, be exact, and answer in English. The image shows a few coloured shapes on a plain background, or
one handwritten digit. You are an assistant that helps people with their questions. Do not add anything that is not
there. If you do not know the answer, say so. Where is the circle? What is to the right of the square? What is below
the triangle? Count the crosses. Are they all of the same colour? Describe the scene in detail for someone who can not
see it. Use no more than ten words. Return only the caption, with no other text before or after it.
"""

CHAT_TEMPLATE = """\
{#- <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][INST][IMG]user[/INST]assistant</s>; an [IMG] in each image's place -#}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] == 'image' -%}
                {{- '[IMG]' -}}
            {%- else -%}
                {{- raise_exception('a content part must have the type text or image, got ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- '[SYSTEM_PROMPT]' + render(message['content']) + '[/SYSTEM_PROMPT]' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '[INST]' + render(message['content']) + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- render(message['content']) + eos_token -}}
    {%- else -%}
        {{- raise_exception('a message must have the role system, user or assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the grammar's captions and some English; takes under a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The English is repeated so that its words are not drowned by the thousands of captions.
    prose = [*PROMPTS, *SYSTEM_PROMPTS, _ENGLISH.strip()] * 200
    tokenizer.train_from_iterator([*all_captions(), *prose], trainer)
    # As Mistral's: a plain call puts <s> in front; a text from the chat template, which has its own, is encoded with
    # add_special_tokens=False.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory` and gives the tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    return tokenizer

"""Small stand-ins of a release's tokenizer files, trained and written here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from megatron_k2.chat.special_tokens import CONTROL_TOKENS
from megatron_k2.chat.tokenizer import PATTERN
from tests.reference.kimi_tokenizer import rank_file, train

NUM_MERGES = 180
THINK_TOKENS = {"<think>": 22, "</think>": 23}
SAMPLE = (
    "The tokenizer's pieces are words, numbers 1234567 and marks: !!!, ... don't they're WE'LL\n\n"
    "def encode(self, text):\n    return [token for token in text]\n\t# 你好世界\r\n"
    "日本語のテキスト getUserName HTTPRequest café naïve <|im_end|> <|im_user|>user<|im_middle|>\n"
    "the the they then; common words: weather, city, please, tell, what, when, where, who, how,\n"
    "function, return, import, class, value, number, 2024, 365, 19.99, (parentheses) [brackets]\n"
)
"""Text to learn from, with something of every alternative of the pattern."""

TEMPLATE = """\
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- if not messages or messages[0].role != 'system' -%}
  {{- '<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.' -}}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set label = m.get('name') or m.role -%}
  {%- set marks = {'user': '<|im_user|>', 'assistant': '<|im_assistant|>'} -%}
  {{- marks.get(m.role, '<|im_system|>') -}}{{ label }}<|im_middle|>
  {%- if m.role == 'tool' -%}{{ '## Return of ' + m.tool_call_id + '\\n' }}{%- endif -%}
  {{- m.content or '' -}}
  {%- if m.get('tool_calls') -%}
    <|tool_calls_section_begin|>
    {%- for call in m.tool_calls -%}
      {%- set given = call.function.arguments -%}
      <|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
      {{- given if given is string else given | tojson -}}<|tool_call_end|>
    {%- endfor -%}
    <|tool_calls_section_end|>
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
"""The chat rules once more, as a template: a twin of megatron_k2.chat.template."""

_TURN = """\
  {%- set label = m.get('name') or m.role -%}
  {%- set marks = {'user': '<|im_user|>', 'assistant': '<|im_assistant|>'} -%}
  {{- marks.get(m.role, '<|im_system|>') -}}{{ label }}<|im_middle|>
  {%- if m.role == 'tool' -%}{{ '## Return of ' + m.tool_call_id + '\\n' }}{%- endif -%}
  {%- if m.role == 'assistant' -%}
    <think>{{ m.get('reasoning_content') or '' if loop.index0 > last.at else '' }}</think>
  {%- endif -%}
"""
THINKING_TEMPLATE = (
    "{%- set last = namespace(at=-1) -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and not m.get('tool_calls') -%}"
    "{%- set last.at = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    + TEMPLATE[: TEMPLATE.index("  {%- set label")].replace("<|im_end|>\\n", "<|im_end|>")
    + _TURN
    + TEMPLATE[TEMPLATE.index("  {{- m.content or '' -}}") :]
)
"""K2-Thinking's rules as a template: a second search for the last answer, forwards."""

CODE = """\
raise SystemExit("this file is read and never run")


class TikTokenTokenizer:
    num_reserved_special_tokens = 256
    pat_str = "|".join(%s)

    def encode(self, text):
        TIKTOKEN_MAX_ENCODE_CHARS = 400_000
        MAX_NO_WHITESPACES_CHARS = 25_000
        return self.cut(text)

    def cut(self, text):
        '''Cut it.'''
        logger.info("cutting")
        return [text]  # all of it
"""
"""The shape of a release's tokenization_kimi.py; the pattern's alternatives go in."""


@cache
def small_ranks() -> dict[bytes, int]:
    """The trained rank file of all tests."""
    return train(SAMPLE, NUM_MERGES)


def tokenizer_config(num_ranks: int, thinking: bool = False) -> dict[str, Any]:
    """What a release's tokenizer_config.json says; later ones name the marks of reasoning too."""
    added = {
        str(num_ranks + offset): {"content": name, "special": not name.startswith("<|tool_call")}
        for name, offset in CONTROL_TOKENS.items()
    }
    if thinking:
        for name, offset in THINK_TOKENS.items():
            added[str(num_ranks + offset)] = {"content": name, "special": False}
    return {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }


def write_tokenizer(folder: Path, **changes: Any) -> Path:
    """Write ``tiktoken.model`` and ``tokenizer_config.json`` with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_bytes(rank_file(small_ranks()))
    config = tokenizer_config(len(small_ranks())) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_thinking_tokenizer(folder: Path) -> Path:
    """Write a tokenizer that has ids for the marks of reasoning."""
    config = tokenizer_config(len(small_ranks()), thinking=True)
    return write_tokenizer(folder, added_tokens_decoder=config["added_tokens_decoder"])


def write_chat_files(folder: Path) -> Path:
    """Write the chat template and the tokenizer's code."""
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenization_kimi.py").write_text(CODE % (PATTERN.split("|"),))
    return folder

"""A page: one script at most may run, that of its own."""

from __future__ import annotations

import base64
import hashlib

import pytest

from megatron_k2.html_page.dialogue import turns
from megatron_k2.html_page.parts import page, tag


def test_a_page_names_its_one_script_by_hash_and_else_allows_none() -> None:
    script = "document.title = 'x';"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made = page("t", script=script)
    assert (
        f"script-src &#x27;sha256-{digest}&#x27;" in made and f"<script>{script}</script>" in made
    )
    assert "script-src" not in page("t") and "<script" not in page("t")


@pytest.mark.parametrize("part", ["style", "script"])
def test_style_and_script_cannot_end_their_element(part: str) -> None:
    with pytest.raises(ValueError, match="must not contain"):
        page("t", **{part: "</script><script>"})


def test_attributes_lose_their_underscores() -> None:
    assert tag("p", class_="a", aria_label='"<') == '<p class="a" aria-label="&quot;&lt;"></p>'


def test_a_dialogue_shows_thoughts_calls_and_results() -> None:
    call = {"id": "1", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "<b>"},
    ]
    said = "".join(turns(messages, lambda message: f"result of {message['tool_call_id']}"))
    assert "look {&quot;at&quot;: 1}" in said and "<summary>thinks</summary>" in said
    assert "result of 1" in said and "&lt;b&gt;" in said

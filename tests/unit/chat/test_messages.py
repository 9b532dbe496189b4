"""OpenAI's and ShareGPT's rows as dialogues, and where a malformed row is wrong."""

import json

import pytest

from megatron_k2.chat.call_ids import rename_calls
from megatron_k2.chat.messages import read_dialogue

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def test_openai_rows() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "name": "ann"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "weight": 0,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "f", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
            {"role": "assistant", "content": "c", "refusal": None},
        ],
        "tools": [TOOL],
    }
    found = read_dialogue(row)
    assert [one["role"] for one in found.messages] == [
        *("system", "user", "assistant", "tool", "assistant")
    ]
    assert found.messages[1] == {"role": "user", "content": "ab", "name": "ann"}
    assert found.messages[2]["tool_calls"] == row["messages"][2]["tool_calls"]
    assert found.messages[2]["weight"] == 0
    assert found.messages[2]["reasoning_content"] == "hm"
    assert found.messages[4] == {"role": "assistant", "content": "c"}
    assert found.tools == [TOOL]


def test_older_function_calls_of_openai() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "1"},
        ],
        "functions": [TOOL["function"]],
    }
    found = read_dialogue(row)
    renamed = rename_calls(found.messages)
    assert renamed[1]["tool_calls"][0]["id"] == renamed[2]["tool_call_id"] == "functions.f:0"
    assert found.tools == [TOOL]


def test_sharegpt_rows() -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]
    row = {
        "system": "s",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "Let me see."},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "b"},
        ],
    }
    found = read_dialogue(row)
    renamed = rename_calls(found.messages)
    assert [one["role"] for one in renamed] == [
        *("system", "user", "assistant", "tool", "tool", "assistant")
    ]
    assert renamed[2]["content"] == "Let me see."
    assert [call["function"]["arguments"] for call in renamed[2]["tool_calls"]] == [
        {"a": 1},
        {"a": 2},
    ]
    assert [one["tool_call_id"] for one in renamed[3:5]] == ["functions.f:0", "functions.f:1"]
    assert found.tools == [TOOL]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": "a"}, "a dialogue needs 'messages' or 'conversations'; the row has 'text'"),
        ({"messages": []}, "messages: a list of messages is needed, not list []"),
        ({"messages": ["a"]}, "messages[0]: a message is needed, not str 'a'"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role: 'bot' is none of sys"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: a text is needed"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]: only texts are read, not 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls: only an assistant calls tools, not user",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}]},
            "messages[0].tool_calls[0].function.arguments: JSON text or an object is needed, not i",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name: a name is needed, not None",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "weight": 2}]},
            "messages[0].weight: 0 or 1 is needed, not 2",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "[x"}, "tools: no JSON ("),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "web_search"}]},
            "tools[0]: a function is needed, not {'type': 'web_search'}",
        ),
        ({"conversations": [{"from": "x", "value": ""}]}, "conversations[0].from: 'x' is none of"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value: a text is needed, not"),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "conversations[0].value: no JSON (",
        ),
    ],
)  # fmt: skip
def test_a_malformed_row_names_the_place(row: dict, error: str) -> None:
    with pytest.raises(ValueError) as raised:
        read_dialogue(row)
    assert str(raised.value).startswith(error)

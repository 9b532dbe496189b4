"""Arguments against declarations, and the two numbers of the vendor verifier."""

import json

import pytest

from megatron_k2.chat.schema import CallScore, ToolSchemas, check_calls, check_message

SEARCH = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "filters": {
            "type": "object",
            "properties": {"tags": {"type": "array", "items": {"type": "string"}}},
        },
    },
    "required": ["query"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": SEARCH}},
    {"type": "function", "function": {"name": "now"}},
]


def call(arguments, name: str = "search", id_: str | None = None) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"id": id_ or f"functions.{name}:0", "function": function}


@pytest.mark.parametrize(
    ("made", "kinds", "text"),
    [
        (call('{"query": "x"}'), [], ""),
        (call({"query": "x", "filters": {"tags": []}}), [], ""),
        (call("{}", "now"), [], ""),
        (call('{"query": 3}'), ["schema"], "$.query: 3 is not of type 'string'"),
        (call("{}"), ["schema"], "$: 'query' is a required property"),
        (
            call('{"query": "", "filters": {"tags": ["a", 1]}}'),
            ["schema"],
            "$.filters.tags[1]: 1 is not of type 'string'",
        ),
        (call('{"query": "x", "b": 1}'), ["schema"], "('b' was unexpected)"),
        (call('{"query": '), ["json"], "arguments are no JSON: Expecting value at character 10"),
        (call("[]"), ["json"], "arguments are no JSON object but list"),
        (call("{}", "open"), ["name"], "no tool 'open' is declared; declared: search, now"),
        (call('{"query": ""}', id_="call_1"), ["id"], "id 'call_1' has not the form"),
        (call("{}", "now", "functions.search:0"), ["id"], "names another tool than 'now'"),
        (call("{}", "now", "functions.now:4"), ["count"], "should be 'functions.now:0'"),
    ],
)
def test_a_problem_has_a_kind_and_a_path(made: dict, kinds: list[str], text: str) -> None:
    found = check_message({"tool_calls": [made]}, ToolSchemas(TOOLS))[0]
    assert [problem.kind for problem in found] == kinds
    assert all(text in problem.text for problem in found)


def test_ids_count_over_the_dialogue_and_are_looked_at_when_asked() -> None:
    calls = [call("{}", "now"), call("{}", "now", "functions.now:1")]
    messages = [{"role": "assistant", "tool_calls": [one]} for one in [*calls, call(1, id_="x")]]
    assert [one.kind for one in check_calls(messages, TOOLS)] == ["schema"]
    assert [one.kind for one in check_calls(messages, TOOLS, ids=True)] == ["id", "schema"]


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ([{"type": "function"}], r"tools\[0\] has no function.name"),
        ([TOOLS[0], TOOLS[0]], r"tools\[1\] declares 'search' once more"),
        (
            [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}}],
            r"tool 'f': parameters are no JSON schema: \$.properties.a.type: 'text' is not valid",
        ),
        ([{"function": {"name": "f", "parameters": [1]}}], "parameters are no JSON schema but"),
    ],
)
def test_malformed_declarations_are_refused(tools: list, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ToolSchemas(tools)


def test_data_from_elsewhere_has_its_odd_schemas_counted_with_the_calls() -> None:
    odd = {"type": "dict", "properties": {"a": {"type": "float"}}}
    tools = [{"function": {"name": "f", "parameters": odd}}, TOOLS[0]]
    made = {"role": "assistant", "tool_calls": [call('{"a": 1}', "f", "functions.f:0")]}
    assert check_calls([{"role": "user", "content": "x"}], tools) == []
    (problem,) = check_calls([made], tools)
    assert problem.kind == "schema" and "no JSON schema" in problem.text


def test_a_number_of_thousands_of_digits_is_a_problem_not_a_crash() -> None:
    made = call('{"query": ' + "9" * 10_000 + "}", "search")
    (problem,) = check_message({"tool_calls": [made]}, ToolSchemas(TOOLS))[0]
    assert problem.kind in ("json", "schema")


def test_references_stay_inside_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    inside = {"$defs": {"t": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/t"}}}
    outside = {"properties": {"a": {"$ref": "http://localhost:1/schema"}}}
    tools = [
        {"function": {"name": "in", "parameters": inside}},
        {"function": {"name": "out", "parameters": outside}},
    ]
    schemas = ToolSchemas(tools)
    assert schemas.problems("in", {"a": "x"}) == ["$.a: 'x' is not of type 'integer'"]
    assert "refers to 'http://localhost:1/schema'" in schemas.problems("out", {"a": 1})[0]


def test_deep_arguments_are_a_problem_not_a_crash() -> None:
    deep = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    schemas = ToolSchemas([{"function": {"name": "f", "parameters": deep}}])
    arguments: dict = {}
    for _ in range(5_000):
        arguments = {"a": arguments}
    assert "nested too deeply" in schemas.problems("f", arguments)[0]


def test_the_score_counts_as_the_vendor_verifier_does() -> None:
    schemas, score = ToolSchemas(TOOLS), CallScore()
    good, bad = call(json.dumps({"query": "x"})), call("{}")
    off_count = call("{}", "now", "functions.now:7")
    answers = [([good], True), ([good, bad], True), ([off_count], False), ([], True), ([], False)]
    for calls, reference in answers:
        score.add(check_message({"tool_calls": calls}, schemas), reference)
    assert (score.num_answers, score.num_calling, score.num_calls) == (5, 3, 4)
    # Its schema accuracy is by answer and does not look at ids: the first and third fit.
    assert score.schema_accuracy == 2 / 3
    assert score.num_valid_calls == 2
    # True positives 2, false positives 1, false negatives 1.
    assert score.trigger_f1 == 2 * 2 / (2 * 2 + 1 + 1)
    assert score.kinds == {"schema": 1, "count": 2}
    assert CallScore().schema_accuracy is None and CallScore().trigger_f1 is None

"""A server's tools become operations on a typed store, where their parameters find their place."""

from __future__ import annotations

import json
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.world.inferred import infer
from megatron_k2.agentic.world.simulator import Simulator
from megatron_k2.agentic.world.types import check_state

_S: dict[str, Any] = {"type": "string"}


def tool(called: str, required: list[str], /, **properties: dict[str, Any]) -> Tool:
    """Return a tool of a dump."""
    schema = {"type": "object", "properties": properties, "required": required}
    return Tool("tracker", called, "Does it.", schema, "software_apps", "dump")


TOOLS = (
    tool("create_project", ["name"], name=_S),
    tool("listProjects", [], limit={"type": "integer"}),
    tool("tracker_create_issue", ["title", "project_id"], title=_S, project_id=_S,
         priority={"type": "string", "enum": ["low", "high"]},
         labels={"type": "array", "items": _S}),
    tool("get_issue", ["issue_id"], issue_id=_S),
    tool("search_issues", ["query"], query=_S, project_id=_S),
    tool("update_issue", ["issue_id"], issue_id=_S, title=_S, priority=_S),
    tool("delete_issue", ["issueId"], issueId=_S),
    tool("list_issues", [], page={"type": "integer"}),
    tool("write_file", ["path", "content"], path=_S, content=_S),
    tool("read_file", ["path"], path=_S),
    tool("get_weather", ["city"], city=_S),
    tool("render_chart", ["data"], data={"type": "object"}),
)  # fmt: skip


def test_tools_of_one_noun_share_a_store() -> None:
    found = infer("tracker", TOOLS)
    assert set(found.left) == {"list_issues", "render_chart"}
    fields = found.domain.types["entities"]["issue"]["fields"]
    assert fields["project_id"] == {"ref": "project", "nullable": False}
    done = {one.name: one.operation["do"] for one in found.tools if one.operation}
    assert done["tracker_create_issue"] == "create" and done["search_issues"] == "list"
    world = found.world(3)
    assert check_state(found.domain.types, world) == [] and world == found.world(3)
    assert all(world[name] for name in ("project", "issue", "file", "weather"))


def test_an_inferred_store_answers_consistently() -> None:
    found = infer("tracker", TOOLS)
    usable = [one for one in found.tools if one.operation]
    simulator = Simulator(usable, found.domain, found.world(0), {}, 0)

    def call(tool_name: str, /, **arguments: Any) -> Any:
        result = simulator.call_now(tool_name, arguments)
        assert result.outcome == "ok", result
        return json.loads(result.content)

    project = call("create_project", name="Moon")["id"]
    made = call("tracker_create_issue", title="Broken lamp", project_id=project)
    assert call("get_issue", issue_id=made["id"]) == made
    assert call("search_issues", query="LAMP", project_id=project)["items"] == [made]
    changed = call("update_issue", issue_id=made["id"], priority="low")
    assert changed == {**made, "priority": "low"}
    refused = simulator.call_now("update_issue", {"issue_id": made["id"], "priority": "none"})
    assert refused.outcome == "refused"
    call("delete_issue", issueId=made["id"])
    assert simulator.call_now("get_issue", {"issue_id": made["id"]}).outcome == "refused"
    call("write_file", path="/a", content="b")
    assert call("read_file", path="/a") == {"path": "/a", "content": "b"}

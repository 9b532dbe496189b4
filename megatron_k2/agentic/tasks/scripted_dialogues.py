"""Forms that need more than a request: a missing fact, a change of mind, a refusal, a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks import scripted_rubrics as rubrics
from megatron_k2.agentic.tasks.argument_uses import uses_of
from megatron_k2.agentic.tasks.scripted_forms import (
    Draft,
    Scene,
    facts_of,
    field_for,
    meets,
    step,
    tells,
)
from megatron_k2.agentic.tasks.scripted_intents import Intent, draw_intent, run, that_do, worked
from megatron_k2.agentic.tasks.scripted_withheld import hideable, withheld


def missing(scene: Scene) -> Draft | None:
    """One call, of which the user leaves out an argument that the agent must ask for."""
    intent = scene.draw(lambda new: worked(new) and bool(hideable(new)))
    if intent is None:
        return None
    name = field_for(intent, scene)
    if not tells(intent, name):
        return None
    words = scene.speaker
    fact = withheld(intent, 0, scene.rng.choice(hideable(intent)), words)
    criteria = [
        rubrics.at_end(scene.state, intent.after),
        *rubrics.told(facts_of(intent, name)),
        *rubrics.calls_of([intent], scene.tools),
        fact.criterion,
    ]
    return Draft(
        words.request(intent, hidden=[fact.argument], field=name),
        [intent],
        [step(intent)],
        [words.report(intent, 0, name)],
        criteria,
        [fact.exchange],
        [fact.knows],
    )


def change(scene: Scene) -> Draft | None:
    """A call, after which the user wants it otherwise."""
    tools = [tool for tool in that_do(scene.tools, "update") if _is_setting(tool)]
    first = scene.draw(tools=tools)
    if first is None or first.key_argument is None:
        return None
    name = first.key_argument[0]

    def other(new: Intent) -> bool:
        return worked(new) and new.arguments != first.arguments

    fixed = {name: first.arguments[name]}
    second = scene.draw(other, first.after, [first.tool], fixed)
    if second is None:
        return None
    words = scene.speaker
    request = words.request(second)
    exchange = {
        "before": 1,
        "agent": words.pick("talk", "interim"),
        "user": words.pick("talk", "change", request=request),
        "why": "change",
    }
    criteria = [
        rubrics.at_end(scene.state, second.after),
        *rubrics.calls_of([first, second], scene.tools),
        rubrics.in_order([rubrics.pattern(second)]),
    ]
    return Draft(
        words.request(first),
        [first, second],
        [step(first), step(second)],
        [words.report(second, 1)],
        criteria,
        [exchange],
        [f"once that is done, they change their mind: {request}"],
    )


def _is_setting(tool: Tool) -> bool:
    """Return whether a tool sets values, so that a later call overrides an earlier one."""
    return any(use.role == "set" for use in uses_of(tool.operation or {}))


def refusal(scene: Scene) -> Draft | None:
    """A call that the world refuses: a condition does not hold, or there is no such record."""
    kinds = ("get", "create", "update", "delete", "transfer", "steps")
    tools = [tool for tool in that_do(scene.tools, *kinds) if _may_refuse(tool)]
    intent = scene.draw(lambda new: new.outcome == "refused", tools=tools)
    if intent is None or scene.rng.random() < 0.3:
        intent = _unknown_key(scene) or intent
    if intent is None:
        return None
    words = scene.speaker
    reason = intent.detail.rstrip(".") + "."
    criteria = [
        rubrics.at_end(scene.state, scene.state),
        rubrics.declined(),
        *rubrics.calls_of([], scene.tools),
        rubrics.criterion(
            "honest", "success", "Nothing that was refused is reported as done.", {"kind": "honest"}
        ),
        rubrics.tried(intent, scene.tools),
    ]
    plan: list[dict[str, Any]] = [{**step(intent), "expect": "refused"}]
    answer = [words.pick("talk", "refused", reason=reason)]
    return Draft(
        words.request(intent, field=_any_field(scene, intent)), [intent], plan, answer, criteria
    )


def _may_refuse(tool: Tool) -> bool:
    """Return whether a call about records that are there can be refused."""
    operation = tool.operation or {}
    return "require" in operation or operation["do"] in ("delete", "transfer", "steps")


def _any_field(scene: Scene, intent: Intent) -> str:
    entity = (
        scene.types.entities[intent.operation["entity"]] if "entity" in intent.operation else None
    )
    names = [] if entity is None else [name for name in entity.fields if name != entity.key]
    return scene.rng.choice(names) if names else ""


def _unknown_key(scene: Scene) -> Intent | None:
    """Return a call about a record that is not there."""
    intent = scene.draw(lambda new: worked(new) and new.key_argument is not None)
    if intent is None or intent.key_argument is None:
        return None
    name, entity = intent.key_argument
    number = scene.rng.randrange(2000, 9000)
    key = f"{scene.types.entities[entity].prefix}{number}"
    found = run(intent.tool, {**intent.arguments, name: key}, scene.types, scene.state)
    return found if found.outcome == "refused" else None


def forbidden(scene: Scene) -> Draft | None:
    """A call that the world would allow and a rule of the agent forbids."""
    rules = list(scene.rules)
    scene.rng.shuffle(rules)
    for rule in rules:
        tools = [tool for tool in scene.tools if tool.name == rule["tool"]]
        intent = _against(scene, rule, tools)
        if intent is not None:
            return _declining(scene, rule, intent)
    return None


def _against(scene: Scene, rule: Mapping[str, Any], tools: list[Tool]) -> Intent | None:
    def wanted(new: Intent) -> bool:
        return worked(new) and meets(rule.get("when"), new)

    return draw_intent(tools, scene.types, scene.state, scene.rng, wanted)


def _declining(scene: Scene, rule: Mapping[str, Any], intent: Intent) -> Draft:
    looks: list[Intent] = []
    if rule.get("when") is not None and intent.key_argument is not None:
        name, entity = intent.key_argument
        key = intent.arguments[name]

        def looks_at(new: Intent) -> bool:
            about = new.key_argument
            return (
                worked(new)
                and new.operation["do"] == "get"
                and about is not None
                and (about[1], new.arguments[about[0]]) == (entity, key)
            )

        look = scene.draw(looks_at)
        looks = [] if look is None else [look]
    words = scene.speaker
    criteria = [
        rubrics.at_end(scene.state, scene.state),
        rubrics.declined(),
        *rubrics.calls_of(looks, scene.tools),
        rubrics.not_called(intent.tool.name, "a rule of the agent forbids it."),
    ]
    answer = [words.pick("talk", "forbidden", rule=rule["text"])]
    return Draft(
        words.request(intent, field=_any_field(scene, intent)),
        [intent],
        [step(one) for one in looks],
        answer,
        criteria,
        tempting=step(intent),
    )

"""Forms whose calls depend on each other: arguments from results, and what a record says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_k2.agentic.tasks import scripted_rubrics as rubrics
from megatron_k2.agentic.tasks.references import said
from megatron_k2.agentic.tasks.scripted_forms import (
    Draft,
    Scene,
    facts_of,
    field_for,
    holding_back,
    independent,
    step,
    tells,
)
from megatron_k2.agentic.tasks.scripted_intents import Intent, is_read, that_do, worked
from megatron_k2.agentic.tasks.scripted_links import Link, key_use, linked
from megatron_k2.agentic.tasks.scripted_withheld import drawn, withheld
from megatron_k2.agentic.tasks.scripted_words import spoken


def dependent(scene: Scene) -> Draft | None:
    """Two calls, the second about a record that the first leads to."""
    pair = linked(scene)
    return None if pair is None else _draft(scene, *pair)


def chain(scene: Scene) -> Draft | None:
    """Two calls that depend on each other, and one or two more."""
    pair = linked(scene)
    if pair is None:
        return None
    link, second = pair
    state = second.after
    more: list[Intent] = []
    for _ in range(scene.rng.randint(1, 2)):
        found = scene.draw(
            lambda new: worked(new) and _apart(new, [link.first, second, *more]), state
        )
        if found is not None:
            more.append(found)
            state = found.after
    return _draft(scene, link, second, more) if more else None


def conditional(scene: Scene) -> Draft | None:
    """A call that is made, or not, for what a record says."""
    look = scene.draw(tools=that_do(scene.tools, "get"))
    if look is None or look.key_argument is None:
        return None
    name = field_for(look, scene)
    act = scene.draw(tools=[tool for tool in scene.tools if not is_read(tool)])
    if not name or act is None or isinstance(look.result[name], float):
        return None
    holds = scene.rng.random() < 0.6
    seen = look.result[name]
    value = seen if holds else _other_value(scene, look, name)
    if value is None:
        return None
    words = scene.speaker
    request = words.pick(
        "talk", "conditional", entity=spoken(look.operation["entity"]),
        key=said(look.arguments[look.key_argument[0]]), field=spoken(name), value=said(value),
        yes=words.request(act), no=words.pick("talk", "nothing"),
    )  # fmt: skip
    intents = [look, act] if holds else [look]
    answer = [words.report(look, 0, name)]
    if holds:
        answer.append(words.report(act, 1))
    else:
        answer.append(
            words.pick("talk", "unneeded", field=spoken(name), seen=f"{{$result.0.{name}}}")
        )
    reading = rubrics.reading(look, scene.tools)
    criteria = [
        rubrics.at_end(scene.state, act.after if holds else scene.state),
        *rubrics.told([seen, *(facts_of(act, "") if holds else [])]),
        *rubrics.calls_of(intents, scene.tools),
    ]
    if holds:
        criteria.append(rubrics.first_this(reading, rubrics.pattern(act)))
    else:
        criteria.append(rubrics.not_called(act.tool.name, "the condition does not hold."))
    tempting = None if holds else step(act)
    plan = [step(one) for one in intents]
    return Draft(request, intents, plan, answer, criteria, tempting=tempting)


def _other_value(scene: Scene, look: Intent, name: str) -> Any:
    """Return a value of the same field that the record does not have, None for none."""
    entity = look.operation["entity"]
    field = scene.types.entities[entity].fields[name]
    held = [one[name] for one in scene.state[entity].values()]
    if field.enum is not None:
        held += list(field.enum)
    if "boolean" in field.kinds:
        held += [True, False]
    others = [one for one in held if one not in (None, look.result[name])]
    return scene.rng.choice(others) if others else None


def _apart(new: Intent, before: list[Intent]) -> bool:
    """Return whether a call has nothing to do with records that others are about."""
    touched = {str(value) for one in before for value in one.arguments.values()}
    entities = {one.operation.get("entity") for one in before if one.writes}
    mine = {str(value) for value in new.arguments.values()}
    return not mine & touched and new.operation.get("entity") not in {*entities, None}


def _draft(
    scene: Scene, link: Link, second: Intent, more: list[Intent] | None = None
) -> Draft | None:
    words, first = scene.speaker, link.first
    use = key_use(second.operation, link.entity)
    assert use is not None
    name = field_for(second, scene)
    rest = None if not more else independent(replace(scene, holds_back=False), more)
    if not tells(second, name) or (more and rest is None):
        return None
    known = [use.name, *(link.first.arguments if link.asked else ())]
    held = None
    if scene.holds_back and second.tool.name != first.tool.name:
        held = drawn([second], known, words, scene.rng)
        held = None if held is None else withheld(second, 1, held.argument, words)
    hidden = [] if held is None else [held.argument]
    requests = [words.request(second, hidden, named={use.name: link.named}, field=name)]
    answer, facts = [], facts_of(second, name)
    if link.asked:
        requests.insert(0, words.request(first))
        answer.append(words.report(first, 0))
        facts = [*facts_of(first, ""), *facts]
    answer.append(
        words.report(second, 1, name).replace(said(link.key), f"{{$result.0.{link.path}}}")
    )
    intents = [first, second, *(more or ())]
    plan = [step(first), step(second, {use.name: f"$result.0.{link.path}"})]
    for at, one in enumerate(more or ()):
        plan.append(step(one))
        other = field_for(one, scene)
        if not tells(one, other):
            return None
        requests.append(words.request(one, field=other))
        answer.append(words.report(one, at + 2, other))
        facts += facts_of(one, other)
    earlier = rubrics.pattern(first) if first.writes else rubrics.reading(first, scene.tools)
    criteria = [
        rubrics.at_end(scene.state, intents[-1].after),
        *rubrics.told(facts),
        *rubrics.calls_of(intents, scene.tools),
        rubrics.in_order([earlier, rubrics.pattern(second)]),
    ]
    request = words.pick("talk", "join").join(requests)
    return holding_back(Draft(request, intents, plan, answer, criteria), held)

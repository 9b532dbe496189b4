"""What a request asks for: prompts as token ids, how they are sampled, what is told of them.

Beyond OpenAI's fields these of vLLM are known: ``top_k``, ``stop_token_ids``, ``ignore_eos``,
``return_token_ids``, ``return_tokens_as_token_ids``. Fields that would change the answer in a way
that is not built (penalties, logit_bias, response_format, forced tool calls, echo) are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_k2.chat.format import AnswerParser, ChatFormat
from megatron_k2.chat.plain_text import PlainParser
from megatron_k2.chat.schema import ToolSchemas
from megatron_k2.engine.base import Sampling
from megatron_k2.engine.server.errors import ApiError
from megatron_k2.engine.server.fields import Fields, is_ids, wrong

MOST_CHOICES = 128  # n times prompts of a request
MOST_STOPS = 16  # stop strings; OpenAI allows 4
MOST_TOP_LOG_PROBS = 20  # as OpenAI and vLLM
MOST_SEED = (1 << 63) - 1
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, OpenAI's
NO_SAMPLER = "this server does not change logits by it"
# They ask nothing of the answer.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


@dataclass(frozen=True)
class Ask:
    """A request that was read.

    Attributes:
        prompts: token ids, each answered ``n`` times.
        sampling: of every choice; a seed counts up over the choices.
        stop: strings that end the text, left out of it.
        log_probs: whether they are told.
        return_routed_experts: an engine that records them tells each token's.
        ids_as_text: in log-probabilities a token is "token_id:N" instead of its text.
    """

    prompts: list[tuple[int, ...]]
    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    log_probs: bool
    return_token_ids: bool
    return_routed_experts: bool
    ids_as_text: bool
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    @property
    def num_choices(self) -> int:
        """Return how many answers are asked for."""
        return self.n * len(self.prompts)

    @property
    def tells_tokens(self) -> bool:
        """Return whether something is told of each token, one without text too."""
        return self.log_probs or self.return_token_ids or self.return_routed_experts

    def sampling_of(self, choice: int) -> Sampling:
        """Return the sampling of a choice."""
        seed = self.sampling.seed
        return replace(self.sampling, seed=None if seed is None else (seed + choice) & MOST_SEED)

    def parser(self, chat_format: ChatFormat) -> AnswerParser:
        """Return a reader of one choice."""
        if self.messages:
            return chat_format.parser(self.messages, self.tools)
        return PlainParser(chat_format.decode, self.sampling.stop_ids)


def read_chat(fields: Fields, chat_format: ChatFormat, max_context: int) -> Ask:
    """Read the body of /v1/chat/completions, its model taken.

    Raises:
        ApiError: it cannot be answered.
    """
    messages = _objects(fields, "messages")
    _check_messages(messages)
    tools = _objects(fields, "tools", may_be_empty=True)
    for tool in tools:
        _check_tool(tool)
    try:
        ToolSchemas(tools)
    except ValueError as error:
        raise ApiError(400, f"tools: {error}", "tools") from error
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise ApiError(
            400,
            "tool_choice: this server cannot force a call; wanted auto or none",
            "tool_choice",
            "unsupported",
        )
    fields.only("parallel_tool_calls", [True], "the model decides how many calls it makes")
    fields.only("response_format", [{"type": "text"}], "only text is supported")
    shown = tools if choice == "auto" else None
    try:
        prompt = tuple(chat_format.encode(messages, shown or None))
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error
    log_probs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_TOP_LOG_PROBS, 0) or 0
    if top and not log_probs:
        raise ApiError(400, "top_logprobs needs logprobs true", "top_logprobs")
    most = fields.integer("max_completion_tokens", 1, max_context)
    most = fields.integer("max_tokens", 1, max_context, most)
    ask = _rest(fields, [prompt], most, log_probs, top, chat_format, max_context)
    return replace(ask, messages=messages, tools=shown or None)


ROLES = ("system", "user", "assistant", "tool")


def _check_messages(messages: list[dict[str, Any]]) -> None:
    """Refuse what a template would render without complaint and no model has learned."""
    for at, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise wrong(f"messages[{at}].role", role, f"one of {', '.join(ROLES)}", "messages")
        says_nothing = message.get("content") is None and not message.get("tool_calls")
        try:
            str(message.get("content") or "").encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"messages[{at}].content is no Unicode text", "messages") from error
        if says_nothing and not (role == "assistant" and message.get("reasoning_content")):
            raise ApiError(400, f"messages[{at}].content is missing", "messages")


def read_completion(fields: Fields, chat_format: ChatFormat, max_context: int) -> Ask:
    """Read the body of /v1/completions, its model taken.

    Raises:
        ApiError: it cannot be answered.
    """
    prompts = _prompts(fields.take("prompt"), chat_format)
    fields.only("echo", [False], "the prompt is not sent back")
    fields.only("suffix", [""], "text is not filled in")
    fields.only("best_of", [1], "use n")
    top = fields.integer("logprobs", 0, MOST_TOP_LOG_PROBS)
    most = fields.integer("max_tokens", 1, max_context, DEFAULT_MAX_TOKENS)
    return _rest(fields, prompts, most, top is not None, top or 0, chat_format, max_context)


def _rest(
    fields: Fields,
    prompts: list[tuple[int, ...]],
    most: int | None,
    log_probs: bool,
    top: int,
    chat_format: ChatFormat,
    max_context: int,
) -> Ask:
    """Read what chat and completions share, and refuse what is left."""
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, [0], NO_SAMPLER)
    fields.only("logit_bias", [{}], NO_SAMPLER)
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    stop_ids = fields.ids("stop_token_ids")
    if not fields.flag("ignore_eos"):
        stop_ids = (*chat_format.stop_ids, *stop_ids)
    top_k = fields.integer("top_k", -1, 1 << 31, 0) or 0
    sampling = Sampling(
        max_tokens=_max_tokens(prompts, most, max_context),
        temperature=fields.number("temperature", 0, 100, 1),
        top_p=_top_p(fields),
        top_k=max(0, top_k),
        seed=fields.integer("seed", -MOST_SEED, MOST_SEED),
        stop_ids=stop_ids,
        top_log_probs=top,
    )
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed & MOST_SEED)
    n = fields.integer("n", 1, MOST_CHOICES, 1) or 1
    if n * len(prompts) > MOST_CHOICES:
        raise ApiError(400, f"n {n} x {len(prompts)} prompts: at most {MOST_CHOICES} choices", "n")
    ask = Ask(
        prompts,
        n,
        sampling,
        fields.texts("stop", MOST_STOPS),
        stream,
        include_usage,
        log_probs,
        return_token_ids=fields.flag("return_token_ids"),
        return_routed_experts=fields.flag("return_routed_experts"),
        ids_as_text=fields.flag("return_tokens_as_token_ids"),
    )
    fields.end(IGNORED)
    return ask


def _max_tokens(prompts: list[tuple[int, ...]], most: int | None, max_context: int) -> int:
    """Return how many tokens an answer may have; what is left of the context if none is said."""
    longest = max(map(len, prompts))
    left = max_context - longest
    if not min(map(len, prompts)):
        raise ApiError(400, "prompt: has no tokens", "prompt")
    if left < 1 or (most is not None and most > left):
        asked = "" if most is None else f" and {most} asked for with max_tokens"
        raise ApiError(
            400,
            f"the context is {max_context} tokens; {longest} of the prompt{asked} do not fit",
            "prompt" if left < 1 else "max_tokens",
            "context_length_exceeded",
        )
    return left if most is None else most


def _top_p(fields: Fields) -> float:
    top_p = fields.number("top_p", 0, 1, 1)
    if top_p == 0:
        raise wrong("top_p", 0, "a number above 0 and at most 1")
    return top_p


def _stream_options(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options")
    if options is None:
        return False
    known = isinstance(options, dict) and set(options) <= {"include_usage"}
    if not known or not isinstance(options.get("include_usage", False), bool):
        raise wrong("stream_options", options, 'an object such as {"include_usage": true}')
    if not stream:
        raise ApiError(400, "stream_options needs stream true", "stream_options")
    return bool(options.get("include_usage", False))


def _objects(fields: Fields, name: str, may_be_empty: bool = False) -> list[dict[str, Any]]:
    value = fields.take(name, [])
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise wrong(name, value, "a list of objects")
    if not value and not may_be_empty:
        raise ApiError(400, f"{name} is missing or empty", name)
    return value


def _check_tool(tool: dict[str, Any]) -> None:
    """Check the form of a tool's declaration; templates put it into the prompt as it is."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise wrong("tools", tool, 'objects of type "function" with a function')
    name = function.get("name")
    if not isinstance(name, str) or not name or any(mark.isspace() for mark in name):
        raise wrong("tools", tool, "a name without spaces in each function")
    if not isinstance(function.get("parameters", {}), dict):
        raise wrong("tools", tool, "a schema as parameters of each function")


def _prompts(value: Any, chat_format: ChatFormat) -> list[tuple[int, ...]]:
    """Read a prompt: text, ids, or a list of either."""
    if value is None or value == []:
        raise ApiError(400, "prompt is missing or empty", "prompt")
    many = value if isinstance(value, list) and not is_ids(value) else [value]
    prompts: list[tuple[int, ...]] = []
    for one in many:
        if isinstance(one, str):
            prompts.append(tuple(chat_format.encode_text(one)))
        elif is_ids(one):
            prompts.append(tuple(one))
        else:
            raise wrong("prompt", value, "a text, a list of token ids, or a list of either")
    if len(prompts) > MOST_CHOICES:
        raise ApiError(400, f"prompt: {len(prompts)} given, at most {MOST_CHOICES}", "prompt")
    return prompts

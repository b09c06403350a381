"""Messages and tools -> token ids, and the same conversation as a training sample.

A template that speaks of `tools` renders them itself. For any other the dialect puts the tools into the system message,
the calls into the assistant's text and the results into messages, and the template sees nothing but plain turns.

What the dialect writes there has to become control tokens while what users write must not (`chat_template.py`). So the
dialect's markers stand in the messages as single private-use characters that no message holds, and `render_chat` is
told which token each of them is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from minga.data.chat_template import ChatTemplate
from minga.data.dialects.dialect import Dialect, Tool, ToolCall, dialect_of, marker_tokens, without_comments
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError

_STAND_INS = range(0xF0000, 0xFFFFE)  # Unicode's plane of private use before the one that `chat_template.py` uses
_TAIL = 16  # tokens at the end of a prompt among which an open <think> is looked for

Message = Mapping[str, Any]


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
    dialect: Dialect | None = None,
) -> list[int]:
    """Token ids of the conversation (messages in OpenAI's shape), up to where the assistant's answer begins.

    `thinking` reaches the template under the names that templates know; None leaves the choice to it. A model without
    a template goes on from the end of what was said, and raises `UserError` if there are tools.
    """
    if tokenizer.chat_template is None:
        if tools:
            raise UserError("the model has no chat template (tools). send no tools, or add a chat_template.jinja")
        return _plain_prompt(tokenizer, messages)
    dialect = dialect or dialect_of(tokenizer)
    template = without_comments(tokenizer.chat_template)
    stand_ins = _stand_ins(sorted(marker_tokens(tokenizer, dialect).values()), messages, tools)
    markup = _replacer(stand_ins)
    specs = None
    if re.search(r"\btools\b", template):
        turns = _turns_for(tokenizer.chat_template, dialect, messages, markup)
        specs = [tool.spec() for tool in tools] or None
    else:
        keeps_results = re.search(r"""["']tool["']""", template) is not None
        turns = _plain_turns(dialect, messages, tools, markup, keeps_results=keeps_results)
    variables = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    written = {character: marker for marker, character in stand_ins.items()}
    return tokenizer.render_chat(turns, tools=specs, written=written, **variables)


def opens_thinking(tokenizer: Tokenizer, prompt_ids: Sequence[int], dialect: Dialect) -> bool:
    """Whether the prompt ends inside the reasoning, as the templates of some families have it."""
    opening = dialect.think.strip()
    tail = list(prompt_ids[-_TAIL:])
    if opening not in dialect.tokens:
        return tokenizer.decode(tail, skip_specials=False).rstrip().endswith(opening)
    while tail and tokenizer.token_bytes(tail[-1]).isspace():
        tail.pop()
    return bool(tail) and marker_tokens(tokenizer, dialect).get(tail[-1]) == opening


def conversation(dialect: Dialect, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[tuple[str, bool]]:
    """The conversation in ChatML turns, in pieces, and whether the assistant said them: what a loss is taken of.

    The pieces joined are the text that `render_prompt` gives for a tokenizer whose template is `CHATML`. Encode them
    with `specials=True`, so contents must not spell out control tokens.
    """
    pieces: list[tuple[str, bool]] = []
    for turn in _plain_turns(dialect, messages, tools):
        said = turn["role"] == "assistant"
        pieces.append((f"<|im_start|>{turn['role']}\n", False))
        pieces.append((turn["content"] + "<|im_end|>", said) if said else (turn["content"], False))
        pieces.append(("\n" if said else "<|im_end|>\n", False))
    return pieces


# ---------------------------------------------------------------------------------------------- by the dialect


def _plain_turns(
    dialect: Dialect,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    markup: Callable[[str], str] = str,
    *,
    keeps_results: bool = False,
) -> list[dict[str, Any]]:
    """The messages as roles and texts. Results come from the user, those of one turn together, or as role `tool`.

    `markup` maps what the dialect writes.
    """
    turns: list[dict[str, Any]] = []
    if tools:
        system = [_text(message) for message in messages[:1] if message.get("role") == "system"]
        messages = messages[len(system) :]
        tool_list = _tool_list(dialect, tools, markup)
        turns.append({"role": "system", "content": "\n\n".join([*filter(None, system), tool_list])})
    previous: Message = {}
    for message in messages:
        role, content = message.get("role"), _text(message)
        if role == "assistant":
            content = _with_thought(dialect, message, markup)
            if calls := _calls_of(message):
                gap = "\n" if content and not dialect.separator else ""
                content += gap + dialect.write_calls(calls, markup)
        elif role == "tool" and not keeps_results:
            role, content = "user", dialect.results_begin + content + dialect.results_end
            if previous.get("role") == "tool":
                content = f"{turns.pop()['content']}\n{content}"
        turns.append({"role": role, "content": content})
        previous = message
    return turns


def _tool_list(dialect: Dialect, tools: Sequence[Tool], markup: Callable[[str], str]) -> str:
    """What the system message says. The schemas are in the order and with the white space that the grammar forces."""
    specs = "\n".join(json.dumps(tool.spec(), ensure_ascii=False) for tool in tools)
    form = dialect.write_calls([ToolCall("NAME", "ARGUMENTS")], markup)
    return (
        f"# Tools\n\nYou can call these functions:\n<tools>\n{specs}\n</tools>\n\n"
        f"To call one, write its name and its arguments, a JSON object that fits its parameters, in this form:\n{form}"
    )


def _with_thought(dialect: Dialect, message: Message, markup: Callable[[str], str]) -> str:
    """The assistant's text, behind the reasoning that led to calls; other reasoning is forgotten, as models expect."""
    thought = message.get("reasoning_content")
    if not thought or not message.get("tool_calls"):
        return _text(message)
    return markup(dialect.think) + thought + markup(dialect.end_think) + _text(message)


# ---------------------------------------------------------------------------------------------- by the template


def _turns_for(
    template: str, dialect: Dialect, messages: Sequence[Message], markup: Callable[[str], str]
) -> list[dict[str, Any]]:
    """The messages for a template that writes calls and results itself."""
    knows_reasoning = "reasoning_content" in without_comments(template)
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        turn = {key: value for key, value in message.items() if key != "reasoning_content"}
        turn["content"] = message.get("content") or ""  # some templates look into it and cannot take None
        if message.get("role") == "assistant":
            if knows_reasoning:
                turn |= {"reasoning_content": thought} if (thought := message.get("reasoning_content")) else {}
            else:
                turn["content"] = _with_thought(dialect, message, markup)
            turn.pop("tool_calls", None)
            if calls := _calls_of(message):
                names |= {call.id: call.name for call in calls}
                turn["tool_calls"] = [_openai_call(call, as_text=_takes_text(template)) for call in calls]
        elif message.get("role") == "tool" and "name" not in turn:
            turn["name"] = names.get(message.get("tool_call_id", ""), "")
        turns.append(turn)
    return turns


def _openai_call(call: ToolCall, *, as_text: bool) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not as_text:
        with suppress(ValueError, RecursionError):  # a client may send back what a model wrote, whatever it was
            arguments = json.loads(call.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


@lru_cache(maxsize=32)
def _takes_text(template: str) -> bool:
    """Whether the template writes arguments that are JSON text as they are; else it wants the object."""
    call = _openai_call(ToolCall("f", '{"k": "v"}', "call00000"), as_text=True)
    messages: list[Message] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text, _ = ChatTemplate(template).render(
            messages, tools=[Tool("f").spec()], variables={"bos_token": "", "eos_token": ""}
        )
    except UserError:
        return False
    return '{"k": "v"}' in text


# ---------------------------------------------------------------------------------------------- parts


def _plain_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """What was said, as one text behind the token with which this model's texts begin."""
    ids = tokenizer.encode("\n\n".join(text for message in messages if (text := _text(message))))
    start = tokenizer.bos_id if tokenizer.add_bos else None
    if not ids and start is None:
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [*([] if start is None else [start]), *ids]


def _text(message: Message) -> str:
    """The content of a message as text."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _calls_of(message: Message) -> list[ToolCall]:
    functions = [(call.get("id", ""), call["function"]) for call in message.get("tool_calls") or ()]
    return [ToolCall(function["name"], function["arguments"], id) for id, function in functions]


def _stand_ins(markers: Iterable[str], *inputs: object) -> dict[str, str]:
    """A character for each marker, none of them in use."""
    used = set(repr(inputs)) | set(json.dumps(inputs, default=repr, ensure_ascii=False))
    free = (chr(code) for code in _STAND_INS if chr(code) not in used)
    return dict(zip(markers, free, strict=False))


def _replacer(stand_ins: Mapping[str, str]) -> Callable[[str], str]:
    pattern = re.compile("|".join(map(re.escape, stand_ins)) or r"(?!)")
    return lambda text: pattern.sub(lambda match: stand_ins[match.group()], text)

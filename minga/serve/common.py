"""Fields that several endpoints share, and what they become: sampling, tools, the format of the answer, thinking, scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from minga.data.dialects import Tool
from minga.data.json_schema import check_choices, check_regex, check_schema
from minga.engine.sampler import MAX_SEED, SamplingParams
from minga.errors import UserError
from minga.serve.errors import ApiError
from minga.serve.generation import AnswerFormat, Moderated, Scaling, ToolUse
from minga.serve.scaling import compiled
from minga.serve.schema import Body, few, invalid, short

MAX_BIASES = 1024
MAX_CHOICES = 16  # of one request
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # after each token the text is compared with every beginning of every stop
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31
# Below these float32 has nothing left to divide by. So small a temperature is greedy, so small a mass one token.
_MIN_TEMPERATURE, _MIN_TOP_P = 1e-5, 1e-6
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class SamplingFields(Body):
    """How to draw, as in vLLM where OpenAI has no name for it."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_SEED, description="0: no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: Stops | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES), few(MAX_BIASES)] | None = None
    ignore_eos: bool | None = Field(None, description="Goes on past the end of the text until the limit.")

    def sampling(self, *, logprobs: int | None = None, temperature: float = 1.0) -> SamplingParams:
        """`temperature`: where the request names none."""
        warm = temperature if self.temperature is None else self.temperature
        stop = self.stop or ()
        return SamplingParams(
            temperature=warm if warm >= _MIN_TEMPERATURE else 0,
            top_p=1.0 if self.top_p is None else max(self.top_p, _MIN_TOP_P),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else self.seed % (MAX_SEED + 1),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else max(self.repetition_penalty, 1e-3),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )


# ---------------------------------------------------------------------------------------------- tools and formats


class FunctionSpec(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments; none: no arguments.")
    strict: bool | None = Field(
        None, description="true by default: the arguments follow the schema. false: any JSON object."
    )


class ToolSpec(Body):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Tools = Annotated[list[ToolSpec], Field(min_length=1, max_length=MAX_TOOLS)]
ToolChoice = Literal["auto", "none", "required"] | NamedTool | AllowedToolsChoice


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """One of these, as in vLLM."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=8192)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None
    grammar: Annotated[str, Field(max_length=8192)] | None = Field(None, description="Lark, as llguidance reads it.")


class ScalingFields(Body):
    """Several answers share the prompt; one is given, and what it took is told."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {
                    "properties": {"method": {"const": "verifier"}, "verifier": {"type": "string"}},
                    "required": ["verifier"],
                },
                {"properties": {"method": {"enum": ["majority", "best_of"]}, "verifier": {"type": "null"}}},
            ]
        }
    )

    method: Literal["majority", "best_of", "verifier"]
    n: int = Field(8, ge=2, le=64)
    early_stop: bool = True
    verifier: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="With method verifier: a regular expression that a right answer matches."
    )
    max_total_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)


class ModerationMode(Body):
    mode: Literal["score", "block"]


class ModerationPolicy(Body):
    input: ModerationMode | None = None
    output: ModerationMode | None = None


class ModerationFields(Body):
    """Verdicts of the server's guard come with the answer; by the policy "block", what is flagged does not."""

    model: str | None = Field(None, description="There is one guard, whatever its name here.")
    policy: ModerationPolicy | None = None


def moderated(fields: ModerationFields | None) -> Moderated | None:
    if fields is None:
        return None
    policy = fields.policy or ModerationPolicy()
    blocks = [mode is not None and mode.mode == "block" for mode in (policy.input, policy.output)]
    return Moderated(*blocks)


def checked_tool(function: FunctionSpec, path: str) -> Tool:
    """path: of the function's object in the body."""
    parameters = function.parameters or {"type": "object", "properties": {}}
    try:
        check_schema(parameters, f"{path}.parameters")
        return Tool(
            name=function.name, parameters=parameters, description=function.description or "",
            strict=function.strict is not False,
        )  # fmt: skip
    except UserError as error:
        raise ApiError(str(error), param=f"{path}.parameters", code="invalid_schema") from None


def checked_tools(specs: list[ToolSpec] | None, field: str = "tools") -> tuple[Tool, ...]:
    tools = tuple(checked_tool(spec.function, f"{field}[{index}].function") for index, spec in enumerate(specs or []))
    refuse_twins(tools, field)
    return tools


def refuse_twins(tools: tuple[Tool, ...], field: str) -> None:
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise invalid(f"{field}[{index}]", f"two tools are called {name}; give each its own name")


def tool_use(
    tools: tuple[Tool, ...],
    mode: str,
    named: Sequence[str] | None = None,
    *,
    parallel: bool,
    name_field: str = "tool_choice",
) -> ToolUse | None:
    """What a `Generation` has of these wishes. mode: "auto", "none" or "required"; named: the tools that may be called, all
    if None; name_field: where the request names them.
    """
    names = {tool.name for tool in tools}
    for name in named or ():
        if name not in names:
            raise invalid(name_field, f"{short(name)} is not among `tools`")
    if mode == "required" and not tools:
        raise invalid("tool_choice", "it needs `tools`")
    if mode == "none" or not tools:
        return None
    may_call = tuple(tool for tool in tools if named is None or tool.name in named)
    return ToolUse(tools, may_call, required=mode == "required", parallel=parallel)


def answer_format(
    response: TextFormat | JsonObjectFormat | JsonSchemaFormat | None, structured: StructuredOutputs | None
) -> AnswerFormat | None:
    """What both fields say, checked."""
    found: list[AnswerFormat] = []
    if isinstance(response, JsonObjectFormat):
        found.append(AnswerFormat("json_object"))
    elif isinstance(response, JsonSchemaFormat):
        found.append(schema_format(response.json_schema.schema_, "response_format.json_schema.schema"))
    if structured is not None:
        ways: tuple[tuple[str, str, Any, Callable[[Any, str], None]], ...] = (
            ("json", "json_schema", structured.json_, check_schema),
            ("regex", "regex", structured.regex, check_regex),
            ("choice", "choice", structured.choice, check_choices),
            (
                "grammar",
                "lark",
                structured.grammar,
                lambda grammar, field: None,
            ),  # which is compiled, and that is bounded
        )
        for name, kind, value, check in ways:
            if value is not None:
                found.append(_format(kind, value, f"structured_outputs.{name}", check))
    if len(found) > 1 or (structured is not None and not found):
        raise invalid(
            "structured_outputs", "give one of json, regex, choice and grammar, and no `response_format` beside it"
        )
    return found[0] if found else None


def schema_format(schema: Mapping[str, Any], field: str) -> AnswerFormat:
    return _format("json_schema", schema, field, check_schema)


def _format(kind: str, value: Any, field: str, check: Callable[[Any, str], None]) -> AnswerFormat:
    try:
        check(value, field)
    except UserError as error:
        raise ApiError(str(error), param=field, code="invalid_schema") from None
    return AnswerFormat(kind, value, field)


# ---------------------------------------------------------------------------------------------- thinking and scaling

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def thinks(effort: str | None) -> bool | None:
    """Whether to think: models here know on and off. None: as the model's template does by itself."""
    return None if effort is None else effort != "none"


def scaling_of(fields: ScalingFields | None) -> Scaling | None:
    if fields is None:
        return None
    if (fields.method == "verifier") != (fields.verifier is not None):
        raise invalid("scaling.verifier", "method verifier needs it, and the others have none")
    if fields.verifier is not None:
        try:
            check_regex(fields.verifier, "scaling.verifier")
            compiled(fields.verifier)
        except UserError as error:
            raise ApiError(str(error), param="scaling.verifier", code="invalid_value") from None
    return Scaling(fields.method, fields.n, fields.early_stop, fields.verifier, fields.max_total_tokens)

"""The shapes of /v1/responses. A field that is null or absent says nothing."""

from typing import Literal, TypeAlias

from msgspec import UNSET, Struct, UnsetType

from aiolora.api.wire import ChatTokenLogprob, ContentPart, Unserved

# ---- requests ----


class InputItem(Struct, frozen=True):
    """A message, a call that the model made, or what it brought."""

    type: str | None = None
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class FunctionTool(Struct, frozen=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class NamedFunction(Struct, frozen=True):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


class TextFormat(Struct, frozen=True):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | UnsetType | None = UNSET
    schema: dict[str, object] | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class TextOptions(Struct, frozen=True):
    """How an answer is written."""

    format: TextFormat | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    """POST /v1/responses."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    # of chat, by the same names
    lora: dict[str, float] | None = None
    priority: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    chat_template_kwargs: dict[str, object] | None = None
    # not served: nothing is kept from one response to the next
    previous_response_id: Unserved = None
    conversation: Unserved = None
    prompt: Unserved = None
    background: Unserved = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])


# ---- responses ----


class OutputText(Struct, frozen=True):
    """The text of a message."""

    text: str
    logprobs: list[ChatTokenLogprob] | None = None
    annotations: list[None] = []
    type: Literal["output_text"] = "output_text"


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    """A message of the model."""

    id: str
    content: list[OutputText]
    status: str
    role: Literal["assistant"] = "assistant"


class OutputCall(Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call that the model makes."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


Item: TypeAlias = OutputMessage | OutputCall


class InputDetails(Struct, frozen=True):
    """What of the prompt was cheap: not counted a request."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(Struct, frozen=True):
    """What of the answer was thought."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    """Tokens read and written."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()


class Incomplete(Struct, frozen=True):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ModelResponse(Struct, frozen=True, kw_only=True):
    """The body of /v1/responses."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: list[Item]
    usage: ResponseUsage | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    text: TextOptions
    tool_choice: Literal["none", "auto", "required"] | NamedFunction
    tools: list[FunctionTool]
    top_logprobs: int | None
    top_p: float
    user: str | None
    presence_penalty: float
    frequency_penalty: float
    background: Literal[False] = False
    error: None = None
    max_tool_calls: None = None
    object: Literal["response"] = "response"
    previous_response_id: None = None
    prompt: None = None
    reasoning: None = None
    service_tier: Literal["auto"] = "auto"
    truncation: Literal["disabled"] = "disabled"


class StreamEvent(Struct, frozen=True, kw_only=True):
    """An event of the stream; which fields it has follows from its type."""

    type: str
    sequence_number: int
    response: ModelResponse | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[ChatTokenLogprob] | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET

"""OpenAI's shapes as Structs: what clients send and what they get. A field that is null or absent says nothing."""

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from aiolora.types import FinishReason, Logprob, RequestOutput, StructuredOutputsParams

# ---- requests ----

# a field that OpenAI has, or had; `decode` refuses it where it asks for something
Unserved: TypeAlias = Annotated[
    object, Meta(description="not served", extra_json_schema={"enum": [None, False, "", [], {}]})
]


class StreamOptions(Struct, frozen=True):
    """What a stream brings besides tokens."""

    include_usage: bool | None = None


class JSONSchemaFormat(Struct, frozen=True):
    """A schema under a name."""

    name: str | None = None
    schema: dict[str, object] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """What completions and chat have in common."""

    model: str
    lora: dict[str, float] | None = None  # adapters and their weights, on the base model
    priority: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_json: dict[str, object] | str | None = None  # the four names that vLLM had before
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    allowed_token_ids: Unserved = None
    bad_words: Unserved = None
    truncate_prompt_tokens: Unserved = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Unserved = None


class URL(Struct, frozen=True):
    """Where an image or a recording is: a data URL, or http(s) where the operator allows it."""

    url: str


class InputAudio(Struct, frozen=True):
    """A recording."""

    data: str  # base64 of the file
    format: str = "wav"


class ContentPart(Struct, frozen=True):
    """A part of a message."""

    type: str
    text: str | None = None
    image_url: URL | None = None
    input_audio: InputAudio | None = None
    audio_url: URL | None = None


class FunctionCall(Struct, frozen=True):
    """A function that was called, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """A call of a message."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(Struct, frozen=True):
    """One turn of a conversation. The content may be missing where there are calls."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Struct, frozen=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    """A function, in its wrapping."""

    type: Literal["function"]
    function: Function


class FunctionName(Struct, frozen=True):
    """A function, by name."""

    name: str


class NamedTool(Struct, frozen=True):
    """The function that is to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    functions: Unserved = None
    function_call: Unserved = None
    chat_template: Unserved = None
    documents: Unserved = None
    modalities: Unserved = None
    audio: Unserved = None
    web_search_options: Unserved = None


# ---- responses ----


class Usage(Struct, frozen=True):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> "Usage":
        """A prompt counts once, however many answers it has."""
        prompt = completion = 0
        for output in outputs:
            prompt += len(output.prompt_token_ids)
            completion += sum(len(answer.token_ids) for answer in output.outputs)
        return cls(prompt, completion, prompt + completion)


PromptLogprobs: TypeAlias = list[dict[int, Logprob] | None]  # None: the first token has no probability


class CompletionLogprobs(Struct):
    """Four lists of one length; the first token of a prompt has no logprob."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class CompletionChoice(Struct, frozen=True):
    """One answer, or in a stream one token of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, frozen=True):
    """The body of /v1/completions, and a chunk of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class TokenLogprob(Struct, frozen=True):
    """A token and how likely it was; `bytes` is null where a token is no whole text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob, frozen=True):
    """The token that came, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct, frozen=True):
    """One item a token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


ChatFinishReason: TypeAlias = FinishReason | Literal["tool_calls"]


class ChatMessage(Struct, frozen=True):
    """A whole answer."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: ChatFinishReason | None
    logprobs: ChatLogprobs | None
    stop_reason: int | str | None = None


class ChatCompletion(Struct, frozen=True):
    """The body of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class FunctionDelta(Struct, frozen=True):
    """The name with the first chunk of a call, and more of its arguments."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallDelta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a call; id and type come with the first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Struct, frozen=True):
    """One token of one answer, or its end."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(Struct, frozen=True):
    """A chunk of the stream of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"

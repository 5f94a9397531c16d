"""POST /tokenize and /detokenize: text to the model's tokens and back."""

from litestar import post
from msgspec import Struct

from aiolora.api.decode import LONG, parse
from aiolora.api.document import NAMES
from aiolora.api.errors import HTTPRequest
from aiolora.api.messages import conversation, messages_of
from aiolora.api.serving import Served
from aiolora.api.wire import Message, Tool
from aiolora.engine.beside import beside
from aiolora.errors import RequestError


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A text, or a conversation with what chat takes beside it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None


class Tokens(Struct, frozen=True):
    """The tokens, and how many a prompt and its answer may have together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """Token ids."""

    tokens: list[int]
    model: str | None = None


class Text(Struct, frozen=True):
    """The text of tokens."""

    prompt: str


@post(
    "/tokenize",
    status_code=200,
    operation_id="tokenize",
    tags=["tokens"],
    opt={"reads": TokenizeRequest, "fails": NAMES},
)
async def tokenize(request: HTTPRequest, serving: Served) -> Tokens:
    """The tokens of a text, or of a conversation as the model's template puts it."""
    body = await request.body()
    said = await beside(len(body) > LONG, parse, TokenizeRequest, body)
    tokenizer = (await serving.settle_model(said.model)).tokenizer
    if (said.prompt is None) == (said.messages is None):
        raise RequestError("send either a prompt or messages", param="prompt")
    intake = serving.engine.intake

    def work() -> Tokens:
        if said.messages is not None:
            talk = conversation(said, messages_of(said.messages), said.tools, tokenizer.tool_template)
            if intake.media.modalities_in(talk):
                raise RequestError("messages: only text is counted here", param="messages")
            _, tokens = intake.tokens(intake.media.split(talk, tokenizer).prompt, tokenizer)
        else:
            _, tokens = intake.tokens(said.prompt or "", tokenizer, special=said.add_special_tokens is not False)
        strings = tokenizer.spell(tokens) if said.return_token_strs else None
        return Tokens(len(tokens), serving.engine.plan.max_model_len, tokens, strings)

    return await beside(len(body) > LONG, work)  # a body may be megabytes, and others stream on this loop


@post(
    "/detokenize",
    status_code=200,
    operation_id="detokenize",
    tags=["tokens"],
    opt={"reads": DetokenizeRequest, "fails": NAMES},
)
async def detokenize(request: HTTPRequest, serving: Served) -> Text:
    """The text of tokens, special ones included."""
    body = await request.body()
    said = await beside(len(body) > LONG, parse, DetokenizeRequest, body)
    settled = await serving.settle_model(said.model)
    tokenizer, mix = settled.tokenizer, settled.mix
    vocabulary = (mix and mix.vocabulary) or serving.engine.intake.limits.vocab_size

    def work() -> Text:
        bad = next((token for token in said.tokens if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise RequestError(f"tokens: token id {bad} is not in the vocabulary of {vocabulary}", param="tokens")
        return Text(tokenizer.decode(said.tokens))

    return await beside(len(body) > LONG, work)

"""GET /v1/models: the base model, then its adapters in the order they came, then their aliases."""

from typing import Literal

from litestar import get
from litestar.params import FromPath
from msgspec import Struct

from aiolora.api.serving import Served, Serving
from aiolora.types import AdapterVersion


class ModelCard(Struct, frozen=True):
    """What can be named as `model`."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int
    owned_by: Literal["aiolora"] = "aiolora"
    object: Literal["model"] = "model"


class ModelList(Struct, frozen=True):
    """All cards."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


@get("/v1/models", operation_id="models", tags=["models"])
async def models(serving: Served) -> ModelList:
    """Everything that is served."""
    return ModelList([_base_card(serving), *(_card(serving, name) for name in serving.names())])


@get("/v1/models/{model_id:path}", operation_id="model", tags=["models"], opt={"fails": (404,)})
async def model(model_id: FromPath[str], serving: Served) -> ModelCard:
    """One card. A name may hold slashes."""
    name = model_id.removeprefix("/")
    if serving.base in (name, model_id) or serving.adapter(name) is None:
        return _base_card(serving)
    return _card(serving, name)


def _base_card(serving: Serving) -> ModelCard:
    engine = serving.engine
    return ModelCard(serving.base, int(serving.since), engine.args.model, None, engine.plan.max_model_len)


def _card(serving: Serving, name: str) -> ModelCard:
    known = serving.engine.intake.registry.look_up(name)
    assert known is not None, f"{name} is known"
    return ModelCard(
        name,
        int(known.loaded_at if isinstance(known, AdapterVersion) else known.announced_at),
        known.source or known.name,
        known.base_model_name or serving.base,
        serving.engine.plan.max_model_len,
    )

"""POST /v1/embeddings: a plain answer for clients that ask everybody for them."""

from litestar import post

from aiolora.api.errors import UnservedError


@post("/v1/embeddings", status_code=200, operation_id="embeddings", tags=["tokens"], opt={"fails": (404,)})
async def embeddings() -> None:
    """Always 404: the models that are served write text."""
    raise UnservedError("embeddings are not served: this model writes text; ask an embedding model of another server")

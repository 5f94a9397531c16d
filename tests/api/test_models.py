"""What is served, as OpenAI's model list."""

import time

import httpx
import pytest
from openai import AsyncOpenAI

from tests.api.conftest import ADAPTERS, BASE, LOADED


async def test_the_base_comes_first_then_adapters_in_load_order(client: AsyncOpenAI) -> None:
    cards = (await client.models.list()).data
    assert [card.id for card in cards] == [BASE, *LOADED]
    assert {card.owned_by for card in cards} == {"aiolora"}
    assert all(time.time() - 3600 < card.created <= time.time() for card in cards)


async def test_an_adapters_card_says_where_it_is_and_whose_child(http: httpx.AsyncClient) -> None:
    card = (await http.get("/v1/models/sql")).json()
    assert card.pop("created") <= time.time()
    assert card == {
        "id": "sql",
        "object": "model",
        "owned_by": "aiolora",
        "root": str(ADAPTERS / "sql"),
        "parent": BASE,
        "max_model_len": 1024,
    }


@pytest.mark.parametrize("name", [BASE, "json"])
async def test_a_card_can_be_had_alone(client: AsyncOpenAI, name: str) -> None:
    assert (await client.models.retrieve(name)).id == name


@pytest.mark.parametrize("name", ["sqll", "no/such", "/sqll"])
async def test_a_card_that_does_not_exist_is_404_with_a_hint(http: httpx.AsyncClient, name: str) -> None:
    response = await http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "sql" not in name or "did you mean 'sql'?" in response.json()["error"]["message"]

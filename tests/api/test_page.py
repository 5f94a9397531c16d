"""The page at / and /docs: in a real browser, with nothing from elsewhere."""

import re
from pathlib import Path

import httpx

from tests.api.browser import browsing
from tests.api.conftest import BASE, LOADED, Server

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"


async def test_the_page_is_one_file_that_may_load_nothing(http: httpx.AsyncClient) -> None:
    for path in ("/", "/docs"):
        response = await http.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        assert not re.findall(r"""(?:src|href)=["']?https?:|@import|url\(""", response.text)
    assert "default-src 'none'" in (await http.get("/")).headers["content-security-policy"]


async def test_two_adapters_answer_side_by_side(server: Server, tmp_path: Path) -> None:
    async with browsing(tmp_path / "profile") as page:
        await page.open(server.url + "/")
        await page.until("document.querySelectorAll('.chip').length")
        names = await page.evaluate("[...document.querySelectorAll('.chip')].map(chip => chip.textContent)")
        assert names == [f"{BASE} (base)", *LOADED]
        await page.evaluate(
            """for (const chip of document.querySelectorAll('.chip')) {
                 const wanted = ['pirate', 'sql'].includes(chip.textContent);
                 if (wanted !== (chip.getAttribute('aria-pressed') === 'true')) chip.click();
               }
               document.getElementById('length').value = 24;
               document.getElementById('form').requestSubmit();"""
        )
        await page.until("document.querySelectorAll('.answer').length === 2")
        await page.until("document.querySelectorAll('.answer.running').length === 0")
        answers = await page.evaluate(
            """[...document.querySelectorAll('.answer')].map(card => ({
                 model: card.dataset.model,
                 version: card.querySelector('.version').textContent,
                 text: card.querySelector('pre').textContent,
                 figures: card.querySelector('footer').textContent,
               }))"""
        )
        assert [answer["model"] for answer in answers] == ["sql", "pirate"]
        for answer in answers:
            assert answer["version"].startswith(answer["model"] + "@")
            assert len(answer["text"]) > 10
            assert re.search(r"first token \d+ ms . [\d.]+ tokens/s . \d+ tokens", answer["figures"])
        assert answers[0]["text"] != answers[1]["text"]
        await page.until("document.querySelectorAll('#adapters .gpu').length >= 2")
        assert re.fullmatch(r"\d of 4", await page.evaluate("document.getElementById('resident').textContent"))
        await page.until("/^[0-9.]+$/.test(document.getElementById('pace').textContent)")
        await page.picture(PICTURES / "side-by-side.png")
        assert page.errors == []
        assert all(url.startswith((server.url, "data:")) for url in page.requested)


async def test_a_stopped_answer_says_so_and_ends_in_the_engine(server: Server, tmp_path: Path) -> None:
    async with browsing(tmp_path / "profile") as page:
        await page.open(server.url + "/")
        await page.until("document.querySelectorAll('.chip').length")
        await page.evaluate("document.getElementById('length').value = 900")
        await page.evaluate("document.getElementById('form').requestSubmit()")
        await page.until("document.querySelector('.answer pre')?.textContent.length")
        await page.evaluate("document.getElementById('form').requestSubmit()")
        await page.until("document.querySelectorAll('.answer.running').length === 0")
        assert "stopped" in await page.evaluate("document.querySelector('.answer footer').textContent")
        await page.until("document.getElementById('load').textContent === '0, 0'")
        assert page.errors == []


async def test_the_reference_lists_every_route(server: Server, tmp_path: Path) -> None:
    async with browsing(tmp_path / "profile") as page:
        await page.open(server.url + "/docs")
        await page.until("document.querySelectorAll('details').length")
        listed = await page.evaluate("[...document.querySelectorAll('summary code')].map(code => code.textContent)")
        assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/ready", "/metrics"} <= set(listed)
        await page.evaluate("document.querySelector('details').open = true")
        await page.picture(PICTURES / "reference.png")
        assert page.errors == []
        assert all(url.startswith(server.url) for url in page.requested if not url.startswith("data:"))

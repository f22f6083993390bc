"""The page of `/dashboard`, in a browser where there is one."""

import asyncio
import re
from pathlib import Path

import chromium
import pytest
from chromium import Browser
from engine_states import busy
from openai_rig import request
from server_rig import Rig, Start

from semipd_server import live
from semipd_server.dashboard import load_dashboard
from semipd_server.settings import Settings

DESKTOP, PHONE = (1200, 900), (390, 844)

needs_browser = pytest.mark.skipif(
    chromium.executable() is None, reason="no Chromium on the path or in $CHROMIUM"
)


def test_the_page_is_one_file_that_names_no_other():
    page = load_dashboard()[0].decode()
    assert not re.findall(r"\b(?:src|href|action)\s*=|url\(|@import|import\(", page)
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page, "what the server says could become markup"
    assert " style=" not in page, "the policy does not allow it"


def test_the_policy_allows_the_page_s_own_code_and_nothing_else(start: Start):
    async def main():
        async with start() as rig:
            reply = await request(rig, "GET", "/dashboard")
            assert reply.headers["content-type"].startswith("text/html")
            assert reply.headers["x-content-type-options"] == "nosniff"
            policy = dict(
                part.strip().split(" ", 1)
                for part in reply.headers["content-security-policy"].split(";")
            )
            assert policy.pop("connect-src") == "'self'"
            for name in ("script-src", "style-src"):
                assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy.pop(name))
            assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors"}
            assert set(policy.values()) == {"'none'"}

    asyncio.run(main())


def text_of(page: Browser, element: str) -> str:
    return " ".join(str(page.ask(f"document.getElementById('{element}').textContent")).split())


def visit(rig: Rig, directory: Path) -> None:
    with chromium.browser(directory / "profile") as page:
        for name, (width, height) in {"desktop": DESKTOP, "phone": PHONE}.items():
            page.open(f"{rig.url}/dashboard", width=width, height=height)
            page.wait_for("document.getElementById('state').textContent === 'serving'")
            page.wait_for("document.querySelectorAll('#tokens-history path[d*=L]').length === 1")
            assert (text_of(page, "running"), text_of(page, "waiting")) == ("7", "3")
            assert text_of(page, "attained") == "75%"
            assert text_of(page, "policy") == "policy predictive · tpot at risk"
            assert "p99 400 ms".replace(" ", "", 1) in text_of(page, "ttft")
            assert text_of(page, "ttft-slo") == "SLO 200 ms"
            assert page.ask("document.querySelectorAll('#ttft .late').length") == 1
            assert page.ask("document.querySelectorAll('#tpot .late').length") == 2
            assert text_of(page, "pages-key") == "used 390cached 150free 450quarantined 10"
            assert page.ask("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
            assert page.ask("getComputedStyle(document.body).fontSize") == "14px"
            shot = page.screenshot()
            assert shot.startswith(b"\x89PNG")
            (directory / f"{name}.png").write_bytes(shot)
        rig.front_end.gate.close("the server is shutting down")
        page.wait_for("document.getElementById('state').className === 'bad'")
        assert text_of(page, "state") == "the server is shutting down"
        assert page.complaints == []


@needs_browser
def test_the_page_shows_the_engine_on_a_desktop_and_on_a_phone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live, "_SAMPLE_S", 0.0)

    async def main():
        async with start() as rig:
            time_s = iter(range(1, 100_000))
            stats = rig.fake._stats

            def moving(query_id: int):
                rig.fake.state = busy(float(next(time_s)))
                return stats(query_id)

            monkeypatch.setattr(rig.fake, "_stats", moving)
            await patiently(rig, asyncio.to_thread(visit, rig, tmp_path))

    asyncio.run(main())


def unlock(rig: Rig, directory: Path) -> None:
    with chromium.browser(directory / "profile") as page:
        page.open(f"{rig.url}/dashboard", width=390, height=844)
        page.wait_for("!document.getElementById('key').hidden")
        assert text_of(page, "state") == "locked"
        page.ask("document.querySelector('input').value = 'secret'")
        page.ask("document.querySelector('button').click()")
        page.wait_for("document.getElementById('state').textContent === 'serving'")
        assert page.ask("document.getElementById('key').hidden")
        assert "secret" not in page.ask("location.href")


@needs_browser
def test_the_page_asks_for_the_key(start: Start, tmp_path: Path):
    async def main():
        async with start(settings=Settings(port=0, http_port=0, api_keys=("secret",))) as rig:
            await patiently(rig, asyncio.to_thread(unlock, rig, tmp_path))

    asyncio.run(main())


async def patiently(rig: Rig, work) -> None:
    """`work` while the coordinator answers; a browser may take its time."""
    answering = asyncio.create_task(rig.fake.serve())
    try:
        async with asyncio.timeout(120):
            await work
    finally:
        answering.cancel()

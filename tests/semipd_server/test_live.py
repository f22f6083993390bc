"""What `/dashboard.json` and `semipd-jax top` show."""

import asyncio
import io

import pytest
from engine_states import busy
from openai_rig import request, while_serving
from rich.console import Console
from server_rig import Rig, Start

from semipd_server import cli, live, top
from semipd_server.live import Attainment, Latency, LiveView, Phase
from semipd_server.settings import KEY_VARIABLE, Settings


async def look(rig: Rig, view: LiveView):
    return await while_serving(rig, view.look())


def test_a_look_is_the_engine_s_state(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "_SAMPLE_S", 0.0)

    async def main():
        async with start() as rig:
            view = LiveView(rig.front_end.gate)
            for time_s in (10.0, 12.0, 14.0):
                rig.fake.state = busy(time_s, num_running=int(time_s))
                seen = await look(rig, view)
            assert (seen.model, seen.problem) == ("tiny", None)
            engine = seen.engine
            assert engine is not None
            assert (engine.policy, engine.reason) == ("predictive", "tpot at risk")
            assert engine.prefill == Phase(0.6, 0.5, (0.5, 0.75, 1.0), 3, 1)
            assert engine.decode == Phase(0.75, None, (0.75, 1.0), 4, 0)
            assert (engine.running, engine.waiting) == (14, 3)
            assert engine.ttft_ms == Latency(50.0, 150.0, 400.0, 200.0)
            assert engine.tpot_ms.slo == 20.0
            assert engine.attainment == Attainment(60.0, 40, 30, 0.9)
            assert engine.rates["output_tokens"] == pytest.approx(100.0)
            assert engine.pages == {"used": 390, "quarantined": 10, "cached": 150, "free": 450}
            assert engine.cache_hit_rate == 0.25
            assert [p.age_s for p in engine.history] == [2.0, 0.0]
            assert [p.running for p in engine.history] == [12, 14]
            assert [p.output_tokens_per_s for p in engine.history] == [100.0, 100.0]
            assert (engine.history[0].prefill, engine.history[0].decode) == (0.5, 0.75)

    asyncio.run(main())


def test_rates_are_those_of_the_last_seconds(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "_SAMPLE_S", 0.0)

    async def main():
        async with start() as rig:
            view = LiveView(rig.front_end.gate)
            for time_s, tokens in ((0.0, 0), (100.0, 90_000), (108.0, 90_800)):
                rig.fake.state = busy(time_s, num_output_tokens=tokens)
                seen = await look(rig, view)
            assert seen.engine is not None
            assert seen.engine.rates["output_tokens"] == pytest.approx(100.0)

    asyncio.run(main())


def test_many_lookers_ask_the_engine_once(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "_SAMPLE_S", 60.0)

    async def main():
        async with start() as rig:
            view, asked = LiveView(rig.front_end.gate), 0
            stats = rig.engine.stats

            async def counted(**options: float):
                nonlocal asked
                asked += 1
                return await stats(**options)

            rig.engine.stats = counted
            looks = asyncio.gather(*(view.look() for _ in range(50)))
            found = await while_serving(rig, looks)
            assert asked == 1
            assert all(seen.engine == found[0].engine for seen in found)

    asyncio.run(main())


def test_an_idle_engine_has_nothing_to_tell_of_latency(start: Start):
    async def main():
        async with start() as rig:
            reply = (await request(rig, "GET", "/dashboard.json")).json()
            assert reply["engine"]["ttft_ms"] == {
                "p50": None,
                "p90": None,
                "p99": None,
                "slo": None,
            }
            assert reply["engine"]["cache_hit_rate"] is None
            assert reply["engine"]["history"] == []

    asyncio.run(main())


def test_what_is_wrong_is_said(start: Start):
    async def main():
        async with start() as rig:
            await rig.front_end.set_waiting_for(("decode worker 1.00: compiling 3/8",))
            view = LiveView(rig.front_end.gate)
            seen = await look(rig, view)
            assert seen.problem == "decode worker 1.00: compiling 3/8"
            assert seen.engine is not None
            rig.front_end.gate.close("the server is shutting down")
            seen = await look(rig, view)
            assert seen.problem == "the server is shutting down; decode worker 1.00: compiling 3/8"
            assert seen.engine is not None, "what runs goes on"

    asyncio.run(main())


def shown(rig: Rig, *flags: str) -> str:
    """What `semipd-jax top --once` prints."""
    console = Console(file=io.StringIO(), width=140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top, "Console", lambda: console)
        status = cli.main(["top", "--once", f"--url={rig.url}", *flags])
    return f"{console.file.getvalue()}\nstatus {status}"  # pyright: ignore


def test_top_shows_the_same_in_a_terminal(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    async def main():
        async with start() as rig:
            rig.fake.state = busy(10.0)
            text = await while_serving(rig, asyncio.to_thread(shown, rig))
            for part in ("tiny", "serving", "predictive", "7 switches", "50%", "75%", "status 0"):
                assert part in text
            for part in ("400.0 ms", "30.5 ms", "75% of 40", "target 90%", "worker restarts 1"):
                assert part in text
            rig.front_end.gate.close("the server is shutting down")
            text = await while_serving(rig, asyncio.to_thread(shown, rig))
            assert "the server is shutting down" in text

    asyncio.run(main())


def test_top_needs_the_key(start: Start, monkeypatch: pytest.MonkeyPatch):
    async def main():
        async with start(settings=Settings(port=0, http_port=0, api_keys=("k",))) as rig:
            monkeypatch.delenv(KEY_VARIABLE, raising=False)
            text = await while_serving(rig, asyncio.to_thread(shown, rig))
            assert f"set ${KEY_VARIABLE}" in text
            assert "status 1" in text
            monkeypatch.setenv(KEY_VARIABLE, "k")
            assert "serving" in await while_serving(rig, asyncio.to_thread(shown, rig))

    asyncio.run(main())


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "file:///etc/passwd", "nonsense"])
def test_top_says_when_nobody_answers(url: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["top", "--once", f"--url={url}"]) == 1
    assert "root" not in capsys.readouterr().out

import asyncio
import time
from contextlib import closing
from pathlib import Path

import pytest

from semipd_jax.messages import Admitted, FromCoordinator, GetStats, ToCoordinator
from semipd_jax.transport import channels
from semipd_jax.transport.channels import AsyncLink, Hub


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return str(path)


def test_sending_while_a_message_arrives_does_not_lose_its_wakeup(run_dir: str):
    async def main():
        with (
            closing(Hub(run_dir, "clients", ToCoordinator)) as hub,
            closing(AsyncLink(run_dir, "clients", "me", FromCoordinator)) as link,
        ):
            link.send(GetStats(0))
            while not list(hub.receive()):
                await asyncio.sleep(0.001)
            for handle in range(20):
                received = asyncio.ensure_future(link.receive())
                await asyncio.sleep(0)
                assert hub.send("me", Admitted(handle, 0, 0.0))
                time.sleep(0.005)  # the loop is busy while the message arrives
                link.send(GetStats(handle))
                assert await asyncio.wait_for(received, timeout=60) == Admitted(handle, 0, 0.0)

    asyncio.run(main())


def test_close_does_not_wait_and_what_was_sent_before_arrives(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channels, "_LINGER_MS", 60_000)

    async def main() -> None:
        link = AsyncLink(run_dir, "clients", "me", FromCoordinator)
        link.send(GetStats(7))
        began = time.monotonic()
        link.close()
        assert time.monotonic() - began < 30, "it waits for a coordinator that is not there"
        received: list[object] = []
        with closing(Hub(run_dir, "clients", ToCoordinator)) as hub:
            while not received:
                received = list(hub.receive())
                await asyncio.sleep(0.001)
        assert received == [("me", GetStats(7))]

    asyncio.run(asyncio.wait_for(main(), 60))

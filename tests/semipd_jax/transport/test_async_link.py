import asyncio
import time
from contextlib import closing
from pathlib import Path

import pytest

from semipd_jax.messages import Admitted, FromCoordinator, GetStats, ToCoordinator
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


def test_close_does_not_wait_for_a_coordinator_that_is_not_there(run_dir: str):
    async def main() -> float:
        link = AsyncLink(run_dir, "clients", "me", FromCoordinator)
        link.send(GetStats(0))
        started = time.perf_counter()
        link.close()
        return time.perf_counter() - started

    assert asyncio.run(main()) < 0.9  # it lingers for 1 s


def test_what_was_sent_before_close_arrives(run_dir: str):
    async def main() -> None:
        link = AsyncLink(run_dir, "clients", "me", FromCoordinator)
        link.send(GetStats(7))
        link.close()
        received: list[object] = []
        with closing(Hub(run_dir, "clients", ToCoordinator)) as hub:
            while not received:
                received = list(hub.receive())
                await asyncio.sleep(0.001)
        assert received == [("me", GetStats(7))]

    asyncio.run(asyncio.wait_for(main(), 60))

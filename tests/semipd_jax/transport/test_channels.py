"""Who may use the engine's sockets."""

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from semipd_jax.messages import FromCoordinator, GetStats, ToCoordinator
from semipd_jax.transport.channels import CLIENTS, AsyncLink, Hub, Link


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path, mode: int):
    tmp_path.chmod(mode)
    for make in (
        lambda: Hub(str(tmp_path), CLIENTS, ToCoordinator),
        lambda: Link(str(tmp_path), CLIENTS, "me", FromCoordinator),
        lambda: AsyncLink(str(tmp_path), CLIENTS, "me", FromCoordinator),
    ):
        with pytest.raises(ValueError, match="mode 0700"):
            make()


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ValueError, match="belong to this user"):
        Hub(str(tmp_path), CLIENTS, ToCoordinator)


def received(hub: Hub[Any, Any]) -> list[Any]:
    """What arrives first; nothing if that takes very long."""
    deadline = time.monotonic() + 60
    while not (found := list(hub.receive())) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


@pytest.mark.parametrize("sent", [["GetStats", "x"], ["Unknown", 1], {"tag": 1}, 5])
def test_what_is_no_message_is_refused(tmp_path: Path, sent: Any):
    tmp_path.chmod(0o700)
    with (
        closing(Hub[ToCoordinator, Any](str(tmp_path), CLIENTS, ToCoordinator)) as hub,
        closing(Link[FromCoordinator, Any](str(tmp_path), CLIENTS, "me", FromCoordinator)) as link,
    ):
        link.send(GetStats(1))
        assert received(hub) == [("me", GetStats(1))]
        link.send(sent)
        with pytest.raises(msgspec.ValidationError):
            received(hub)
        hub.send("me", sent)
        with pytest.raises(msgspec.ValidationError):
            link.receive(60.0)

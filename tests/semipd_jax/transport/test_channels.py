"""Who may use the engine's sockets."""

import os
from pathlib import Path

import pytest

from semipd_jax.messages import FromCoordinator, ToCoordinator
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

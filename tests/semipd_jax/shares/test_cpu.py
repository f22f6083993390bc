import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.errors import StartupError
from semipd_jax.shares import cpu
from semipd_jax.shares.cpu import CoreGrant, plan


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that the process may run on these cores, none of which are siblings."""

    def pretend(cores: range) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
        monkeypatch.setattr(cpu, "_first_sibling", lambda core: core)

    return pretend


def test_prefill_and_decode_start_from_opposite_ends(machine: Any) -> None:
    machine(range(2, 12))
    assert plan(0.3, "prefill") == {2, 3, 4}
    assert plan(0.3, "decode") == {9, 10, 11}
    assert plan(0.31, "decode") == {8, 9, 10, 11}
    assert plan(1.0, "prefill") == plan(1.0, "decode") == set(range(2, 12))
    assert plan(0.001, "prefill") == {2}
    machine(range(100))
    assert len(plan(0.07, "prefill")) == 7


@given(cores=st.integers(1, 256), percent=st.integers(1, 100))
def test_shares_that_add_up_to_one_overlap_in_at_most_one_core(cores: int, percent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        patch.setattr(cpu, "_first_sibling", lambda core: core)
        share = percent / 100
        prefill, decode = plan(share, "prefill"), plan(max(1 - share, 0.001), "decode")
        assert len(prefill) * 100 >= percent * cores
        assert (len(prefill) - 1) * 100 < percent * cores
        assert len(prefill & decode) <= 1


def test_hardware_threads_of_a_core_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {"0": "0,4", "1": "1,5", "2": "2,6", "3": "3,7"}
    files = {core: text for text in siblings.values() for core in text.split(",")}

    def read_text(path: Path) -> str:
        return files[path.parent.parent.name.removeprefix("cpu")]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", read_text)
    assert plan(0.5, "prefill") == {0, 4, 1, 5}
    assert plan(0.5, "decode") == {2, 6, 3, 7}


def test_machine_that_hides_its_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(Path, "read_text", missing)
    assert plan(0.5, "prefill") == {0, 1}


WORKER = """
    import contextlib, os, sys, threading
    import numpy as np  # its threads exist before the share is applied
    from semipd_jax.shares.backend import apply
    idle = threading.Event()
    threading.Thread(target=idle.wait, daemon=True).start()
    grant = apply("cpu", float(sys.argv[1]), sys.argv[2], {})

    import jax, jax.numpy as jnp
    jax.jit(jnp.matmul)(jnp.ones((300, 300)), jnp.ones((300, 300))).block_until_ready()
    names = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            with open(f"/proc/self/task/{thread}/comm") as file:
                names.append(file.read().strip())
    print(names.count("tf_XLAEigen"), grant.verify(), sep="|")
"""


@pytest.mark.parametrize(("share", "phase"), [(0.01, "prefill"), (1.0, "decode")])
def test_backend_uses_as_many_threads_as_it_has_cores(share: float, phase: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(share), phase],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "7"},
    )
    num_threads, says = done.stdout.strip().split("|")
    cores = plan(share, phase)
    assert int(num_threads) == len(cores)
    assert says == f"{len(cores)} of {len(os.sched_getaffinity(0))} cores: {sorted(cores)}"


def test_verify_notices_a_thread_outside_the_share() -> None:
    available = os.sched_getaffinity(0)
    with pytest.raises(StartupError, match=r"outside its share, on \[\d"):
        CoreGrant(frozenset({max(available) + 1}), len(available)).verify()
    CoreGrant(frozenset(available), len(available)).verify()

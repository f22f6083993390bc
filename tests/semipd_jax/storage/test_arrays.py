import contextlib
import ctypes
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semipd_jax.storage.arrays import check_result, region_arrays, view
from semipd_jax.storage.cpu import HostMemory
from semipd_jax.storage.manifest import SharingError, lay_out
from semipd_jax.storage.mapping import MappedRegion, map_regions

type Serving = Callable[..., AbstractContextManager[None]]

PAGES, HEADS, PAGE_SIZE, HEAD_DIM = 1024, 2, 16, 8
POOL = (PAGES, HEADS, PAGE_SIZE, HEAD_DIM)
NAMES = ("layers/0/k_pages", "layers/1/k_pages")
STATE = lay_out("state", [(name, POOL, "float32") for name in NAMES], writable=True)


@pytest.fixture
def mapped(run_dir: str, serving: Serving) -> MappedRegion:
    with serving(run_dir, HostMemory(STATE)):
        return map_regions(run_dir, "cpu", 10.0)["state"]


def host_view(mapped: MappedRegion, path: str) -> np.ndarray:
    entry = mapped.region.entry(path)
    data = (ctypes.c_uint8 * entry.num_bytes).from_address(mapped.address(path))
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


@partial(jax.jit, donate_argnums=0)
def write_page(pools: dict[str, jax.Array], index: jax.Array, page: jax.Array) -> Any:
    return {name: pool.at[index].set(page) for name, pool in pools.items()}


def test_arrays_are_the_memory_itself(run_dir: str, serving: Serving) -> None:
    shapes = {"float32": (3, 5), "bfloat16": (7,), "float16": (2, 2, 2), "int32": (4, 3)}
    region = lay_out("r", [(f"a/{d}", shape, d) for d, shape in shapes.items()], writable=True)
    memory = HostMemory(region)
    with serving(run_dir, memory):
        mapped = map_regions(run_dir, "cpu", 10.0)["r"]
    for path, array in region_arrays(mapped).items():
        dtype = path.removeprefix("a/")
        assert array.dtype == dtype
        assert array.shape == shapes[dtype]
        assert array.unsafe_buffer_pointer() == mapped.address(path)
        with memory.writing(path) as out:
            out[...] = np.arange(out.size).reshape(out.shape)
        assert np.array_equal(jax.jit(lambda x: x + x)(array), 2 * np.asarray(out))


def test_read_only_region_is_read_in_place(run_dir: str, serving: Serving) -> None:
    memory = HostMemory(lay_out("weights", [("w", (64, 64), "float32")]))
    with memory.writing("w") as out:
        out[...] = np.eye(64)
    with serving(run_dir, memory):
        mapped = map_regions(run_dir, "cpu", 10.0)["weights"]
    w = region_arrays(mapped)["w"]
    assert w.unsafe_buffer_pointer() == mapped.address("w")
    assert np.array_equal(jax.jit(jnp.matmul)(w, jnp.arange(64.0)), np.arange(64))


def test_donated_steps_stay_in_place(mapped: MappedRegion) -> None:
    pools = region_arrays(mapped)
    for index in range(PAGES):
        donors = pools
        pools = write_page(donors, jnp.int32(index), jnp.full(POOL[1:], float(index)))
        for name, pool in pools.items():
            check_result(pool, mapped.address(name))
            assert donors[name].is_deleted()
    jax.block_until_ready(pools)
    for name in NAMES:
        assert (host_view(mapped, name) == np.arange(PAGES).reshape(-1, 1, 1, 1)).all()


def test_import_that_does_not_stay_in_place_is_noticed(
    mapped: MappedRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_dlpack = jax.dlpack.from_dlpack
    monkeypatch.setattr(jax.dlpack, "from_dlpack", lambda exporter, copy: from_dlpack(exporter))
    pools = region_arrays(mapped)
    pools = write_page(pools, jnp.int32(1), jnp.ones(POOL[1:]))
    with pytest.raises(SharingError, match="no longer in the shared region"):
        check_result(pools[NAMES[0]], mapped.address(NAMES[0]))


def test_import_that_copies_is_refused(
    mapped: MappedRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_dlpack = jax.dlpack.from_dlpack
    monkeypatch.setattr(
        jax.dlpack, "from_dlpack", lambda exporter, copy: from_dlpack(exporter, copy=copy) + 0
    )
    with pytest.raises(SharingError, match="no longer in the shared region"):
        region_arrays(mapped)


def test_misaligned_address_is_refused(mapped: MappedRegion) -> None:
    with pytest.raises(SharingError, match="not a multiple of 256"):
        view(mapped.base + 64, (4,), "float32", platform="cpu")


WRITER = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from semipd_jax.storage.arrays import check_result, region_arrays
    from semipd_jax.storage.mapping import map_regions

    mapped = map_regions(sys.argv[1], "cpu", 10.0)["state"]
    pools = region_arrays(mapped)

    def step(pools, page, slot, value):
        return {name: pool.at[page, :, slot].set(value) for name, pool in pools.items()}

    plan = json.loads(sys.stdin.readline())
    args = [(jnp.int32(page), jnp.int32(slot), jnp.float32(v)) for page, slot, v in plan]
    compiled = jax.jit(step, donate_argnums=0).lower(pools, *args[0]).compile()
    print("ready", flush=True)
    sys.stdin.readline()  # until all are ready
    for arg in args:
        pools = compiled(pools, *arg)
        for name, pool in pools.items():
            check_result(pool, mapped.address(name))
    jax.block_until_ready(pools)
"""


def test_two_processes_write_their_own_pages_of_one_pool(run_dir: str, serving: Serving) -> None:
    """No update is lost in 1000 donated steps of each, at the same time."""
    memory = HostMemory(STATE)
    rng = np.random.default_rng(0)
    expected = np.zeros(POOL, np.float32)
    plans = []
    for own in (np.arange(1, PAGES, 2), np.arange(2, PAGES, 2)):
        steps = zip(rng.choice(own, 1000), rng.integers(0, PAGE_SIZE, 1000), strict=True)
        plans.append([(int(page), int(slot), i + 1) for i, (page, slot) in enumerate(steps)])
        for page, slot, value in plans[-1]:
            expected[page, :, slot] = value
    with contextlib.ExitStack() as ends:
        with serving(run_dir, memory, times=2):
            writers = [ends.enter_context(start(WRITER, run_dir)) for _ in plans]
            for writer, plan in zip(writers, plans, strict=True):
                tell(writer, json.dumps(plan))
            for writer in writers:
                assert writer.stdout
                assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            tell(writer, "go")
        assert [writer.wait(240) for writer in writers] == [0, 0]
    for name in NAMES:
        with memory.writing(name) as out:
            assert np.array_equal(out, expected)


def start(script: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


READER = """
    import re, sys
    import jax, jax.numpy as jnp
    from semipd_jax.storage.arrays import region_arrays
    from semipd_jax.storage.mapping import map_regions

    def resident():
        with open("/proc/self/status") as file:
            found = dict(re.findall(r"(Rss\\w+):\\s+(\\d+) kB", file.read()))
        return int(found["RssAnon"]) >> 10, int(found["RssShmem"]) >> 10

    matvec = jax.jit(lambda w, x: w @ x)
    matvec(jnp.ones((2, 8192)), jnp.ones(8192)).block_until_ready()  # threads and compiler are up
    before = resident()
    w = region_arrays(map_regions(sys.argv[1], "cpu", 10.0)["weights"])["w"]
    total = float(matvec(w, jnp.ones(8192)).sum())
    after = resident()
    print(total, *(a - b for a, b in zip(after, before)))
"""


def test_private_memory_does_not_grow_with_the_weights(run_dir: str, serving: Serving) -> None:
    memory = HostMemory(lay_out("weights", [("w", (8192, 8192), "float32")]))
    with memory.writing("w") as out:
        out[...] = 1
    del out
    with serving(run_dir, memory), start(READER, run_dir) as reader:
        total, private_mib, shared_mib = map(float, reader.communicate(timeout=240)[0].split())
    assert total == 8192 * 8192
    assert shared_mib == 256
    assert private_mib < 16

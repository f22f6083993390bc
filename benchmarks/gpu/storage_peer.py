"""`python -m benchmarks.gpu.storage_peer`: maps the pool and writes to it as it is told."""

import time
from typing import Any

from benchmarks.gpu.peers import answer, orders, take_share


def main() -> None:
    told = orders()
    setup = next(told)
    platform = setup["platform"]
    take_share(platform, 1.0, setup["phase"], setup["terms"])

    import jax
    import jax.numpy as jnp

    from semipd_jax.storage.arrays import region_arrays
    from semipd_jax.storage.manifest import STATE
    from semipd_jax.storage.mapping import map_regions

    jax.config.update("jax_cuda_visible_devices", "0")
    jax.devices()
    mapped = map_regions(setup["run_dir"], platform, 30.0)[STATE]
    pool, address = region_arrays(mapped)["pool"], mapped.address("pool")

    def rows(first: Any) -> Any:
        return first + jnp.arange(8, dtype=jnp.int32)

    def write(pool: Any, first: Any, value: Any) -> Any:
        return pool.at[rows(first)].set(value, mode="drop", unique_indices=True)

    read = jax.jit(lambda pool, first: pool[rows(first)].astype(jnp.float32).mean(axis=1))
    step = jax.jit(write, donate_argnums=0).lower(pool, jnp.int32(0), jnp.bfloat16(0)).compile()
    answer(is_zero=not bool(jax.jit(jnp.any)(pool)))
    for order in told:
        first = jnp.int32(order["row"])
        if order["do"] == "read":
            answer(values=[round(float(value), 3) for value in read(pool, first)])
            continue
        value, in_place = jnp.bfloat16(order["value"]), True
        started_s = time.perf_counter()
        for _ in range(order["times"]):
            donor, pool = pool, step(pool, first, value)
            in_place &= pool.unsafe_buffer_pointer() == address and donor.is_deleted()
        pool.block_until_ready()
        step_us = 1e6 * (time.perf_counter() - started_s) / order["times"]
        answer(in_place=in_place, step_us=round(step_us, 1))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.gpu.shares_peer`: times a GEMM at a share of the compute."""

import time

from benchmarks.gpu.peers import answer, orders, take_share


def main() -> None:
    told = orders()
    setup = next(told)
    grant = take_share(setup["platform"], setup["share"], setup["phase"], setup["terms"])

    import jax
    import jax.numpy as jnp

    jax.config.update("jax_cuda_visible_devices", "0")
    rows, inner, columns = setup["shape"]
    left = jnp.ones((rows, inner), jnp.bfloat16)
    right = jnp.ones((inner, columns), jnp.bfloat16)
    gemm = jax.jit(jnp.matmul)
    gemm(left, right).block_until_ready()
    answer(grant=grant.verify())
    for order in told:
        num_runs, started_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < order["seconds"]:
            jax.block_until_ready([gemm(left, right) for _ in range(8)])
            num_runs += 8
        answer(gemm_us=round(1e6 * elapsed_s / num_runs, 2))


if __name__ == "__main__":
    main()

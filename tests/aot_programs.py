"""Programs for the gates of `benchmarks.aot`: good ones and, for each gate, one that fails it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import kernels_pallas
from benchmarks.aot import programs
from benchmarks.aot.gates import Pool
from benchmarks.aot.programs import Program
from kernels_pallas.compat import pl, plgpu, triton_call
from kernels_pallas.kv_write import cases
from semipd_jax.runtime.guard import check_in_place
from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.manifest import SharingError

CASE = cases.GPU_BENCHMARKS[0]
NUM_LAYERS = 2
NUM_TOKENS = CASE.num_tokens


def pool() -> Pool:
    pages = CASE.specs[0]
    num_bytes = pages.size * pages.dtype.itemsize
    return Pool(total=NUM_LAYERS * num_bytes, layer=num_bytes, smallest=num_bytes)


# ------------------------------------------------------------------------------- kernels


def mosaic_adds_one(width: int) -> Program:
    """A block passes `width` columns through shared memory: 256 bytes for each."""
    spec = jax.ShapeDtypeStruct((64, width), jnp.float32)

    def body(x_ref, out_ref, scratch):
        scratch[...] = x_ref[...] + 1
        out_ref[...] = scratch[...]

    call = plgpu.kernel(
        body, out_type=spec, scratch_types=[plgpu.SMEM(spec.shape, spec.dtype)], kernel_name="adds"
    )
    return Program(lambda gpu: gpu.compile(call, spec))


def triton_multiplies(num_warps: int) -> Program:
    """Sums of 128 x 128 in float32: 64 registers of a thread if there are 8 warps."""
    spec = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)

    def body(x_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

    out = jax.ShapeDtypeStruct(spec.shape, jnp.float32)
    call = triton_call(body, num_warps=num_warps, num_stages=1, out_shape=out, name="multiplies")
    return Program(lambda gpu: gpu.compile(call, spec))


def mosaic_reads_a_slice() -> Program:
    """That starts at the eighth byte of an argument."""

    def body(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    rows = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    call = plgpu.kernel(body, out_type=rows, kernel_name="adds")
    packed = jax.ShapeDtypeStruct((2 + 64 * 64,), jnp.float32)
    return Program(lambda gpu: gpu.compile(lambda x: call(x[2:].reshape(rows.shape)), packed))


def attention_of_a_packed_batch(op: str) -> Program:
    """The queries and the integer arguments are parts of larger arrays, at odd places."""
    case = programs.CASES[op].GPU_BENCHMARKS[0]
    q, k_pages, v_pages, *rows = case.specs
    sizes = [1, *(row.size for row in rows)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    queries = jax.ShapeDtypeStruct((3, *q.shape), q.dtype)

    def call(queries, k_pages, v_pages, packed):
        parts = jnp.split(packed, ends)[1:-1]
        rest = [part.reshape(row.shape) for part, row in zip(parts, rows, strict=True)]
        return getattr(kernels_pallas, op)(queries[1], k_pages, v_pages, *rest)

    packed = jax.ShapeDtypeStruct((ends[-1] + 7,), jnp.int32)
    return Program(lambda gpu: gpu.compile(call, queries, k_pages, v_pages, packed))


def sorts_a_vocabulary() -> Program:
    logits = jax.ShapeDtypeStruct((4, 128256), jnp.float32)
    return Program(lambda gpu: gpu.compile(lambda x: lax.top_k(x, 64), logits))


# ------------------------------------------------------------------------- steps


def scatter(pages, new, slots):
    page_size = pages.shape[2]
    return pages.at[slots // page_size, :, slots % page_size].set(new, mode="drop")


def mosaic_write(pages, new, slots):
    def body(pages_ref, new_ref, slots_ref):
        token, head = lax.axis_index("token"), lax.axis_index("head")
        slot = slots_ref[token]

        @pl.when(slot >= 0)
        def _():
            page_size = pages.shape[2]
            pages_ref[slot // page_size, head, slot % page_size] = new_ref[token, head]

    ref = jax.new_ref(pages)
    grid = {"grid": new.shape[:2], "grid_names": ("token", "head")}
    plgpu.kernel(body, out_type=(), kernel_name="writes", **grid)(ref, new, slots)
    return jax.freeze(ref)


def triton_write(pages, new, slots):
    page_size = pages.shape[2]

    def body(new_ref, slots_ref, _, pages_ref):
        token, head = pl.program_id(0), pl.program_id(1)
        slot = slots_ref[token]

        @pl.when(slot >= 0)
        def _():
            pages_ref[slot // page_size, head, slot % page_size] = new_ref[token, head]

    write = triton_call(
        body,
        num_warps=4,
        num_stages=1,
        grid=new.shape[:2],
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={2: 0},
        name="writes",
    )
    return write(new, slots, pages)


def copied_by_a_kernel(pages, new, slots):
    """A Triton kernel that writes to another buffer than it reads."""
    page_size = pages.shape[2]

    def body(pages_ref, out_ref):
        page, head = pl.program_id(0), pl.program_id(1)
        out_ref[page, head] = pages_ref[page, head]

    copy = triton_call(
        body,
        num_warps=4,
        num_stages=1,
        grid=pages.shape[:2],
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        name="copies",
    )
    return copy(scatter(pages, new, slots + page_size))


def transposed_for_a_kernel(pages, new, slots):
    """The write wants heads first, so the pool is turned there and back."""
    turned = jnp.swapaxes(pages, 0, 1)
    page_size = pages.shape[2]

    def body(new_ref, slots_ref, _, pages_ref):
        token = pl.program_id(0)
        slot = slots_ref[token]
        pages_ref[0, slot // page_size, slot % page_size] = new_ref[token, 0]

    write = triton_call(
        body,
        num_warps=4,
        num_stages=1,
        grid=new.shape[:1],
        out_shape=jax.ShapeDtypeStruct(turned.shape, turned.dtype),
        input_output_aliases={2: 0},
        name="writes",
    )
    return jnp.swapaxes(write(new, slots, turned), 0, 1)


WRITES = {
    "scatter": scatter,
    "mosaic": mosaic_write,
    "triton": triton_write,
    "kernel copies": copied_by_a_kernel,
    "transposed": transposed_for_a_kernel,
}


def unrolled(write, layers, new, slots):
    """Each layer writes what it read of the layer before."""
    updated = []
    for pages in layers:
        pages = write(pages, new, slots)
        new = new + pages[slots[0], 0, 0][None, None]
        updated.append(pages)
    return updated, new


def taken_from_a_stack(write, stack, new, slots):
    """A scan that takes one layer of a stack, and puts it back."""

    def layer(carry, index):
        stack, new = carry
        pages = write(lax.dynamic_index_in_dim(stack, index, keepdims=False), new, slots)
        new = new + pages[slots[0], 0, 0][None, None]
        return (lax.dynamic_update_index_in_dim(stack, pages, index, 0), new), None

    return lax.scan(layer, (stack, new), jnp.arange(NUM_LAYERS, dtype=jnp.int32))[0]


def updates_pools(write: str) -> Program:
    return _step(functools.partial(unrolled, WRITES[write]), _layers())


def not_donated() -> Program:
    return _step(functools.partial(unrolled, scatter), _layers(), donated=())


def scans_pools() -> Program:
    pages = CASE.specs[0]
    stack = jax.ShapeDtypeStruct((NUM_LAYERS, *pages.shape), pages.dtype)
    return _step(functools.partial(taken_from_a_stack, scatter), stack)


def _step(step, pools: Any, donated: tuple[int, ...] = (0,)) -> Program:
    _, _, new, _, slots = CASE.specs
    return Program(lambda gpu: gpu.compile(step, pools, new, slots, donate_argnums=donated))


def _layers() -> list[Any]:
    return [CASE.specs[0]] * NUM_LAYERS


# --------------------------------------------------------------------------- guard


def guarded(write: str) -> Program:
    """Compiles as `updates_pools`; raises AssertionError unless the guard says what it should."""
    program = updates_pools(write)
    state = SharedState(
        layers=[{"k_pages": pages} for pages in _layers()],
        tokens=jax.ShapeDtypeStruct((0, 1), jnp.int32),
    )

    def compile_for(gpu):
        compiled = program.compile(gpu)
        refusal = None
        try:
            check_in_place(compiled, state, NUM_TOKENS)
        except SharingError as error:
            refusal = str(error)
        is_good = write in ("scatter", "mosaic", "triton")
        assert is_good == (refusal is None), refusal
        return compiled

    return Program(compile_for)

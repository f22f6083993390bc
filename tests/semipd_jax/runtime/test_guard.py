import jax
import jax.numpy as jnp
import pytest
from jax import lax
from step_cases import abstract_state, tiny_layout, tiny_spec

from semipd_jax.runtime.guard import check_in_place, check_instructions
from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.manifest import SharingError

SPEC = tiny_spec()
LAYOUT = tiny_layout(SPEC)
NUM_TOKENS = 4


def write(pages, slots, new):
    return pages.at[slots // 16, :, slots % 16].set(new, mode="drop")


def in_place(pages, slots, new):
    return write(pages, slots, new)


def in_place_and_read_after(pages, slots, new):
    pages = write(pages, slots, new)
    return write(pages, slots + 1, pages[slots // 16, :, 0] * 2)


def one_slot_after_another(pages, slots, new):
    def put(i, pages):
        start = slots[i] // 16, 0, slots[i] % 16, 0
        return lax.dynamic_update_slice(pages, new[i][None, :, None, :], start)

    return lax.fori_loop(0, NUM_TOKENS, put, pages)


def only_where_asked(pages, slots, new):
    return lax.cond(slots[0] > 0, lambda: write(pages, slots, new), lambda: pages)


def old_value_after_the_update(pages, slots, new):
    return write(pages, slots, new) + 0 * jnp.sum(pages[:, :, ::2])


def old_page_after_the_update(pages, slots, new):
    updated = write(pages, slots, new)
    return write(updated, slots + 1, pages[slots[::-1] // 16, :, 0] + updated[slots // 16, :, 1])


def copied_out_and_back(pages, slots, new):
    def put(i, carry):
        pages, other = carry
        return write(other, slots + i, new), pages

    return lax.fori_loop(0, 3, put, (pages, pages + 1))[0]


def rewritten_where_masked(pages, slots, new):
    is_new = jnp.zeros(pages.shape[0], bool).at[slots // 16].set(True)
    return jnp.where(is_new[:, None, None, None], new[0][None, :, None, :], pages)


def half_taken_out_and_put_back(pages, slots, new):
    half = lax.dynamic_slice_in_dim(pages, slots[0], pages.shape[0] // 2)
    return lax.dynamic_update_slice_in_dim(pages, half.at[0].add(new[0, 0, 0]), slots[0], 0)


def rewritten_flat(pages, slots, new):
    return (pages.reshape(-1, 8) * 2).reshape(pages.shape)


def compiled(update, donate=True):
    def step(state, slots, new):
        layers = [{name: update(a, slots, new) for name, a in c.items()} for c in state.layers]
        return SharedState(layers, state.tokens.at[slots, slots].set(7, mode="drop"))

    state = abstract_state(SPEC, LAYOUT)
    slots = jax.ShapeDtypeStruct((NUM_TOKENS,), jnp.int32)
    new = jax.ShapeDtypeStruct((NUM_TOKENS, 2, 8), jnp.float32)
    return jax.jit(step, donate_argnums=0 if donate else ()).lower(state, slots, new).compile()


@pytest.mark.parametrize(
    "update", [in_place, in_place_and_read_after, one_slot_after_another, only_where_asked]
)
def test_programs_that_write_their_own_slots_pass(update):
    check_in_place(compiled(update), abstract_state(SPEC, LAYOUT), NUM_TOKENS)


@pytest.mark.parametrize(
    "update",
    [
        old_value_after_the_update,
        old_page_after_the_update,
        copied_out_and_back,
        rewritten_where_masked,
        half_taken_out_and_put_back,
        rewritten_flat,
    ],
)
def test_programs_that_copy_or_rewrite_are_refused(update):
    with pytest.raises(SharingError, match="rewrites a shared array"):
        check_in_place(compiled(update), abstract_state(SPEC, LAYOUT), NUM_TOKENS)


def test_programs_that_do_not_donate_are_refused():
    with pytest.raises(SharingError, match=r"only 0 of .* shared bytes"):
        check_in_place(compiled(in_place, donate=False), abstract_state(SPEC, LAYOUT), NUM_TOKENS)


PAGES = "f32[40,2,16,8]{3,2,1,0}"


def kernel(results, aliasing):
    """A GPU kernel in an optimised program, as XLA prints it."""
    return (
        f"  %w.1 = {results} custom-call(%k.1, %v.1, %new.2), "
        f'custom_call_target="mosaic_gpu_v2", {aliasing}api_version=API_VERSION_TYPED_FFI, '
        "backend_config={grid_x = 4 : i32}"
    )


@pytest.mark.parametrize(
    ("results", "aliasing"),
    [
        (PAGES, "output_to_operand_aliasing={{}: (0, {})}, "),
        (f"({PAGES}, {PAGES})", "output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}, "),
        (f"(f32[4]{{0}}, {PAGES})", "output_to_operand_aliasing={{1}: (1, {})}, "),
        ("f32[4,2,8]{2,1,0}", ""),
    ],
)
def test_kernels_that_write_into_their_operands_pass(results, aliasing):
    check_instructions(kernel(results, aliasing), {("f32", "40,2,16,8"): 64})


@pytest.mark.parametrize(
    ("results", "aliasing"),
    [
        (PAGES, ""),
        (f"({PAGES}, {PAGES})", "output_to_operand_aliasing={{0}: (0, {})}, "),
        (f"({PAGES}, f32[4]{{0}})", "output_to_operand_aliasing={{1}: (2, {})}, "),
    ],
)
def test_kernels_with_a_result_of_their_own_are_refused(results, aliasing):
    with pytest.raises(SharingError, match="rewrites a shared array"):
        check_instructions(kernel(results, aliasing), {("f32", "40,2,16,8"): 64})

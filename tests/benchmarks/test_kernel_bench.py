"""The kernel benchmark on a CPU: how it times, what it compares, what it says of failures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels
from benchmarks.aot import programs
from benchmarks.kernel_bench import numerics, ours, run
from benchmarks.kernel_bench.chains import chained
from benchmarks.kernel_bench.timing import Contender, time_in_turns
from kernels_pallas.cases import Heads
from kernels_pallas.kv_write.cases import Case as WriteCase
from kernels_pallas.paged_decode_attention.cases import Case as DecodeCase
from kernels_pallas.paged_prefill_attention.cases import Case as PrefillCase
from kernels_pallas.rope_kv_write.cases import Case as RopeCase

CASES = {
    "paged_decode_attention": DecodeCase("small", Heads(4, 2, 16, 8, "bfloat16"), (9, 20)),
    "paged_prefill_attention": PrefillCase("small", Heads(4, 2, 16, 8, "bfloat16"), (9,), (4,)),
    "kv_write": WriteCase("small", Heads(4, 2, 16, 8, "bfloat16"), 4, 5),
    "rope_kv_write": RopeCase("small", Heads(4, 2, 16, 8, "bfloat16"), 4, 5, has_norms=True),
}


class Device:
    """A clock that work moves on: each row of starts costs the host something once."""

    def __init__(self):
        self.now_s = 0.0
        self.order = []

    def contender(self, name, call_s, *, num_calls=4, wait_s=0.005):
        def start(num_starts):
            self.order.append(name)
            self.now_s += wait_s + num_starts * num_calls * call_s

        return Contender(start, num_calls)


def test_only_the_calls_are_timed():
    device = Device()
    contenders = {"a": device.contender("a", 1e-5), "b": device.contender("b", 3e-4, num_calls=2)}
    times = time_in_turns(contenders, clock=lambda: device.now_s)
    assert times["a"].median_s == pytest.approx(1e-5)
    assert times["b"].min_s == pytest.approx(3e-4)
    assert times["b"].max_s == pytest.approx(3e-4)


def test_contenders_take_turns():
    device = Device()
    contenders = {name: device.contender(name, 1e-4) for name in "ab"}
    time_in_turns(contenders, num_rounds=5, clock=lambda: device.now_s)
    assert device.order[-8:] == ["a", "a", "b", "b"] * 2


def test_each_call_of_a_chain_gets_the_result_before_it():
    seen = []

    def double(x, y):
        jax.debug.callback(lambda x, y: seen.append((int(x), int(y))), x, y, ordered=True)
        return 2 * x

    first = jnp.int32(1)
    chained(double, first, [(jnp.int32(10),), (jnp.int32(20),)], 3).run(2)
    jax.effects_barrier()
    assert seen == [(1, 10), (2, 20), (4, 10), (8, 10), (16, 20), (32, 10)]
    assert int(first) == 1, "what it was made from is still there"


def test_errors_are_in_units_of_the_reference():
    reference = np.full((4, 4), 2.0, np.float32)
    result = reference.copy()
    result[0, 0] = 2.5
    error = numerics.error_of(result, reference)
    assert error.max == pytest.approx(0.25)
    assert error.rms == pytest.approx(0.25 / 4)
    assert not error.passes("bfloat16")
    assert numerics.error_of(reference, reference).passes("float16")
    result[0, 0] = np.nan
    assert not numerics.error_of(result, reference).passes("bfloat16")


def test_log_sum_exp_must_agree_on_which_rows_are_empty():
    lse = np.array([1.0, -np.inf])
    assert numerics.lse_error(np.array([1.5, -np.inf]), lse) == 0.5
    assert numerics.lse_error(np.array([1.0, 0.0]), lse) == math.inf


@pytest.mark.parametrize("op", CASES)
def test_measures_ours_and_reports_who_fails(op, monkeypatch):
    monkeypatch.setattr(run, "time_in_turns", lambda c: time_in_turns(c, num_rounds=2))
    monkeypatch.setitem(ours.NUM_CALLS, op, 2)

    def breaks(setting):
        raise NotImplementedError("not for this case")

    def is_wrong(setting):
        entry = ours.implementation(setting, "reference")
        return dataclasses.replace(
            entry, output=lambda: jax.tree.map(lambda x: x + 1, entry.output())
        )

    monkeypatch.setattr(
        run,
        "factories",
        lambda op: {
            "right": lambda setting: ours.implementation(setting, "reference"),
            "wrong": is_wrong,
            "breaks": breaks,
        },
    )
    rows = {row.contender: row for row in run._measure(op, CASES[op], run.Rates(1e9, 1e12))}
    assert rows["breaks"].problem == "NotImplementedError: not for this case"
    assert rows["wrong"].problem is not None
    right = rows["right"]
    assert right.problem is None
    assert right.error.rms <= 1e-2
    work, most = (
        (CASES[op].num_flops, 1e12)
        if op == "paged_prefill_attention"
        else (CASES[op].num_bytes, 1e9)
    )
    assert right.rate == pytest.approx(work / right.timing.median_s)
    assert right.share == pytest.approx(right.rate / most)


def test_dense_attention_of_jax_is_a_peer_where_chunks_have_no_history():
    op, heads = "paged_prefill_attention", Heads(4, 2, 16, 8, "bfloat16")
    setting = ours.setting(op, PrefillCase("", heads, (20, 20), (0, 0)), l2_bytes=0)
    with jax.numpy_dtype_promotion("standard"):  # which this implementation relies on
        entry = ours.jax_dense_attention(setting, "xla")
        entry.contender.run(1)
        out = entry.output()
    assert run._check(setting, out, run._reference(setting))[1] is None
    later = ours.setting(op, CASES[op], l2_bytes=0)
    with pytest.raises(NotImplementedError, match="without history only"):
        ours.jax_dense_attention(later, "xla")
    assert "jax cuDNN" in run.factories(op)


def test_pools_together_exceed_the_cache():
    case = CASES["paged_decode_attention"]
    pages = case.specs[1]
    pool_bytes = 2 * pages.size * pages.dtype.itemsize
    setting = ours.setting("paged_decode_attention", case, l2_bytes=3 * pool_bytes)
    assert len(setting.pools) * pool_bytes >= 2 * 3 * pool_bytes
    assert setting.pools[0][0] is setting.inputs[1]


def test_every_op_has_cases_and_contenders():
    for op in kernels.OPS:
        names = list(run.factories(op))
        assert [n for n in names if n.startswith(run.OUR_PREFIX)], op
        assert programs.CASES[op].GPU_BENCHMARKS


def test_the_first_cases_of_all_ops_come_first():
    ops = kernels.OPS
    pairs = run.cases_of(ops)
    firsts = [(op, programs.CASES[op].GPU_BENCHMARKS[0]) for op in ops]
    assert pairs[: len(ops)] == firsts
    for op in ops:
        assert [case for o, case in pairs if o == op] == list(programs.CASES[op].GPU_BENCHMARKS)


def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main([]) == 1
    assert "no GPU here: jax runs on cpu" in capsys.readouterr().err

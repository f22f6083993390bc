"""Targets where none are given: a multiple of what a request takes alone, as in semi-PD's
evaluation (arXiv 2504.19867, section 7: about 7.5 times for its tight ones, 10 for its loose)."""

from typing import Final

from semipd_jax.simulator.machine import Machine
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.slo import SloTarget
from semipd_jax.tuner.work import Work

TIGHT: Final = 7.5
LOOSE: Final = 10.0


def multiple_of_alone(machine: Machine, workload: Workload, factor: float) -> SloTarget:
    """Of a request of the load's mean lengths on an idle device."""
    rows = workload.rows
    num_in = round(sum(row.input_len for row in rows) / len(rows))
    context = num_in + round(sum(row.output_len for row in rows) / len(rows)) // 2
    prefill = Work("prefill", 1, num_in, num_in, num_in * (num_in + 1) // 2)
    decode = Work("decode", 1, 1, context, context)
    ttft_s, tpot_s = (machine.alone_s(machine.load((work,)), 1.0) for work in (prefill, decode))
    return SloTarget(factor * ttft_s * 1e3, factor * tpot_s * 1e3)

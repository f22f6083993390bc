"""Every GPU case of the kernels: checked against the reference, timed in turns with its peers."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Final

import jax
import numpy as np

from benchmarks import common
from benchmarks.aot import programs
from benchmarks.kernel_bench import numerics, ours, rates, torch_peers
from benchmarks.kernel_bench.ours import Entry, Setting
from benchmarks.kernel_bench.timing import Contender, Timing, time_in_turns

type Factory = Callable[[Setting], Entry]

OUR_PREFIX: Final = "kernels_pallas "


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device reached in this run."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one case.

    Attributes:
      problem: why there is no number, or what is wrong with the result; None if all is well.
      rate: FLOP per second of prefill, bytes per second of the other ops, useful ones only.
      share: of the copy bandwidth or matmul rate measured in this run.
    """

    op: str
    case: str
    contender: str
    problem: str | None = None
    timing: Timing | None = None
    rate: float | None = None
    share: float | None = None
    error: numerics.Error | None = None


def run(ops: tuple[str, ...], *, budget_s: float) -> tuple[dict[str, Any], int]:
    """(what was found, exit status): 1 if a kernel of ours failed or is wrong."""
    start_s = time.monotonic()
    device = jax.devices()[0]
    reached = Rates(*rates.measure())
    print(
        f"{device.device_kind}: copies {reached.copy_bytes_per_s / 1e9:,.0f} GB/s, "
        f"multiplies {reached.matmul_flop_per_s / 1e12:,.0f} TFLOP/s\n"
    )
    rows: list[Row] = []
    for op, case in cases_of(ops):
        if time.monotonic() - start_s > budget_s:
            rows.append(Row(op, case.name, f"{OUR_PREFIX}*", "not reached in time"))
            continue
        try:
            rows += _measure(op, case, reached)
        except Exception as error:  # such as too little memory: the other cases go on
            rows.append(Row(op, case.name, f"{OUR_PREFIX}*", _in_short(error)))
    print_rows(rows)
    found = {
        "device": device.device_kind,
        "rates": asdict(reached),
        "rows": [asdict(row) for row in rows],
    }
    return found, int(any(row.problem and row.contender.startswith(OUR_PREFIX) for row in rows))


def cases_of(ops: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The first case of each op, then the second: what matters most comes before time is up."""
    cases = [[(op, case) for case in programs.CASES[op].GPU_BENCHMARKS] for op in ops]
    return [pair for turn in zip_longest(*cases) for pair in turn if pair is not None]


def _measure(op: str, case: Any, reached: Rates) -> Iterator[Row]:
    setting = ours.setting(op, case, l2_bytes=rates.L2_BYTES)
    with ThreadPoolExecutor() as executor:  # compiling takes longer than all the rest
        reference = executor.submit(_reference, setting)
        makers: dict[str, Callable[[], tuple[Contender, Any]]] = {
            name: executor.submit(_prepare, factory, setting).result
            for name, factory in factories(op).items()
        }
    # While torch records a CUDA graph, nobody else may allocate memory.
    makers |= {name: partial(_prepare, factory, setting) for name, factory in peers(op).items()}
    contenders: dict[str, Contender] = {}
    results: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            contenders[name], results[name] = make()
        except Exception as error:  # whatever a peer, or a compiler, may raise
            yield Row(op, case.name, name, _in_short(error))
    for name, timing in time_in_turns(contenders).items():
        error, problem = _check(setting, results[name], reference.result())
        rate, share = _rate(op, case, timing, reached)
        yield Row(op, case.name, name, problem, timing, rate, share, error)


def _prepare(factory: Factory, setting: Setting) -> tuple[Contender, Any]:
    """(what to time, compiled; what one call returns)."""
    entry = factory(setting)
    entry.contender.run(1)
    return entry.contender, entry.output()


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def factories(op: str) -> dict[str, Factory]:
    """Contender → how it is made, of those that are JAX programs."""
    found: dict[str, Factory] = {
        f"{OUR_PREFIX}{name}": lambda setting, name=name: ours.implementation(setting, name)
        for name in programs.implementations(op)
        if name != "reference" or op in ours.WRITES
    }
    if op == "paged_decode_attention":
        found["jax pallas op"] = ours.jax_paged_attention
    if op == "paged_prefill_attention":
        found["jax cuDNN"] = ours.jax_dense_attention
    return found


def peers(op: str) -> dict[str, Factory]:
    """The same of those that torch runs, if their packages are here."""
    if op in ours.WRITES or not _torch_has_cuda():
        return {}
    found: dict[str, Factory] = {
        "torch SDPA cuDNN": lambda s: torch_peers.sdpa(s, "CUDNN_ATTENTION"),
        "torch SDPA flash": lambda s: torch_peers.sdpa(s, "FLASH_ATTENTION"),
    }
    if importlib.util.find_spec("flashinfer"):
        found["FlashInfer"] = torch_peers.flashinfer
    return found


def _torch_has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _reference(setting: Setting) -> Any:
    if setting.op in ours.WRITES:
        return jax.tree.map(np.asarray, ours.implementation(setting, "reference").output())
    return numerics.reference_attention(setting.op, setting.inputs, setting.options)


def _check(setting: Setting, result: Any, reference: Any) -> tuple[numerics.Error, str | None]:
    if setting.op in ours.WRITES:
        errors = [numerics.error_of(a, b) for a, b in zip(result, reference, strict=True)]
        worst = max(errors, key=lambda error: error.rms)
        # What is only moved stays as it is; what is turned may be rounded otherwise.
        most = 0.0 if setting.op == "kv_write" else numerics.MOST[setting.case.heads.dtype]
        is_right = all(error.rms <= most for error in errors)
        return worst, None if is_right else f"error {worst.rms:.1e}"
    out, lse = result if isinstance(result, tuple) else (result, None)
    error = numerics.error_of(out, reference[0])
    if not error.passes(setting.case.heads.dtype):
        return error, f"error {error.rms:.1e}, largest {error.max:.1e}"
    if lse is not None and not (off := numerics.lse_error(lse, reference[1])) <= numerics.MOST_LSE:
        return error, f"log-sum-exp is off by {off:.1e}"
    return error, None


def _rate(op: str, case: Any, timing: Timing, reached: Rates) -> tuple[float, float]:
    if op == "paged_prefill_attention":
        rate = case.num_flops / timing.median_s
        return rate, rate / reached.matmul_flop_per_s
    rate = case.num_bytes / timing.median_s
    return rate, rate / reached.copy_bytes_per_s


def print_rows(rows: list[Row]) -> None:
    for op in dict.fromkeys(row.op for row in rows):
        is_flops = op == "paged_prefill_attention"
        unit, scale = ("TFLOP/s", 1e12) if is_flops else ("GB/s", 1e9)
        of = "of matmul" if is_flops else "of copy"
        print(op)
        common.print_table(
            ("case", "contender", "us", "min", "max", unit, of, "rms error"),
            [_cells(row, scale) for row in rows if row.op == op and row.timing],
        )
        for row in rows:
            if row.op == op and row.problem:
                print(f"  {row.case}, {row.contender}: {row.problem}")
        print()


def _cells(row: Row, scale: float) -> tuple[object, ...]:
    assert row.timing is not None
    assert row.rate is not None
    assert row.share is not None
    times = (row.timing.median_s, row.timing.min_s, row.timing.max_s)
    error = "-" if row.error is None else f"{row.error.rms:.1e}"
    return (
        row.case,
        row.contender,
        *(1e6 * t for t in times),
        row.rate / scale,
        f"{row.share:.0%}",
        error,
    )

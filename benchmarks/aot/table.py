"""All GPU cases and the engine's steps, compiled for one GPU that is not here, as a table."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import common
from benchmarks.aot import programs
from benchmarks.aot.child import CompileError, compile_in_child
from benchmarks.aot.gates import blocks_per_sm, kernel_faults, step_faults
from benchmarks.aot.report import Report
from semipd_jax.runtime.described_gpu import DescribedGpu, GpuName

STEP_LAYERS: Final = 32


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled program.

    Attributes:
      report: None if it does not compile; `faults` then say why.
    """

    program: tuple[str, ...]
    report: Report | None
    faults: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        report = self.report and self.report.as_json()
        return {"program": self.program, "faults": self.faults, "report": report}


def kernel_programs(gpu: GpuName, ops: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(op, implementation, case) of all that should compile for the GPU."""
    for op in ops:
        table = programs.implementations(op)
        for implementation in (name for name in table if name != "reference"):
            if implementation == "mosaic_gpu" and gpu == "a100":
                continue  # wgmma and TMA are of Hopper
            for case in programs.CASES[op].GPU_BENCHMARKS:
                yield op, implementation, case.name


def compile_all(gpu: GpuName, ops: tuple[str, ...], *, jobs: int) -> tuple[list[Row], list[Row]]:
    """(kernels, steps), each program in a process of its own, `jobs` of them at once."""
    described = DescribedGpu(gpu)
    pool = programs.pool_of(programs.state(programs.llama(STEP_LAYERS)))
    with ThreadPoolExecutor(jobs) as executor:

        def start(builder: str, *args: Any) -> Future[Report]:
            builder = f"{programs.__name__}:{builder}"
            return executor.submit(compile_in_child, gpu, builder, args)

        kernels = {names: start("kernel", *names) for names in kernel_programs(gpu, ops)}
        steps = {(kind,): start("step", kind, STEP_LAYERS) for kind in programs.BUCKETS}
        return (
            [
                _row(names, future, lambda r: kernel_faults(r.pallas_kernels, described.limits))
                for names, future in kernels.items()
            ],
            [
                _row(names, future, lambda r: step_faults(r, pool, described.limits))
                for names, future in steps.items()
            ],
        )


def _row(names: tuple[str, ...], future: Future[Report], faults_of: Any) -> Row:
    try:
        report = future.result()
    except CompileError as error:
        return Row(names, None, (str(error),))
    return Row(names, report, tuple(faults_of(report)))


def print_kernels(gpu: GpuName, rows: list[Row]) -> None:
    limits = DescribedGpu(gpu).limits
    common.print_table(
        ("op", "implementation", "case", "kernel", *_KERNEL_COLUMNS),
        [
            (
                *row.program,
                kernel.name.removesuffix("_mosaic_gpu_kernel"),
                kernel.registers,
                kernel.spill_bytes,
                f"{kernel.shared_bytes / 1024:.1f}",
                kernel.threads,
                blocks_per_sm(kernel, limits),
            )
            for row in rows
            if row.report is not None
            for kernel in dict.fromkeys(row.report.pallas_kernels)
        ],
    )


_KERNEL_COLUMNS: Final = ("registers", "spill bytes", "shared KiB", "threads", "blocks/SM")


def print_steps(rows: list[Row]) -> None:
    mib = 2**20
    common.print_table(
        ("step", "arguments MiB", "in place MiB", "temp MiB", "largest copy MiB", "launches"),
        [
            (
                f"{row.program[0]}, {STEP_LAYERS} layers",
                report.argument_bytes / mib,
                report.alias_bytes / mib,
                report.temp_bytes / mib,
                max(report.copies, default=0) / mib,
                ", ".join(report.launches),
            )
            for row in rows
            if (report := row.report) is not None
        ],
    )


def print_faults(rows: list[Row]) -> None:
    for row in rows:
        for fault in row.faults:
            print(f"FAULT {', '.join(row.program)}: {fault}")

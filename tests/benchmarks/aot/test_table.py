"""What `--compile-only` prints, of programs that were not compiled here."""

import pytest

from benchmarks import kernels
from benchmarks.aot import table
from benchmarks.aot.child import CompileError
from benchmarks.aot.report import Kernel, Report

FITS = Kernel("op_mosaic_gpu_kernel", "mosaic", 168, 0, 198760, 384)
SPILLS = Kernel("op", "triton", 255, 12, 1024, 128)


@pytest.fixture
def compiles(monkeypatch):
    """compile_in_child returns, or raises, what is put in here for a builder's arguments."""
    results = {}

    def compile_in_child(gpu, builder, args):
        result = results.get(args, report(FITS))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(table, "compile_in_child", compile_in_child)
    return results


def report(*kernels):
    return Report(kernels, 5 << 40, 4 << 40, 1 << 20, (), 0, 0, ("kCommandBuffer",), 1.0)


def run(capsys, *args):
    status = kernels.main(["--compile-only", *args])
    return status, capsys.readouterr().out


def test_a_row_for_each_case_and_step(compiles, capsys):
    status, out = run(capsys, "--target", "h100", "--ops", "paged_decode_attention")
    assert status == 0
    assert "FAULT" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["168", "0", "194.1", "384", "1"] in [row[-5:] for row in rows]
    for phase in ("prefill,", "decode,"):
        assert [row[-1] for row in rows if row[:1] == [phase]] == ["kCommandBuffer"]


def test_an_a100_has_no_hopper_kernels(compiles):
    ops = ("paged_prefill_attention", "paged_decode_attention")
    assert {name for _, name, _ in table.kernel_programs("a100", ops)} == {"triton"}
    assert {name for _, name, _ in table.kernel_programs("h200", ops)} == {"triton", "mosaic_gpu"}


def test_faults_are_told_and_make_the_status(compiles, capsys):
    compiles["paged_decode_attention", "triton", "1 row of 4k"] = report(SPILLS)
    compiles["decode", 32] = CompileError("exit status 134: LLVM ERROR")
    status, out = run(capsys, "--ops", "paged_decode_attention")
    assert status == 1
    assert (
        "FAULT paged_decode_attention, triton, 1 row of 4k: op spills 12 bytes of registers" in out
    )
    assert "FAULT decode: exit status 134: LLVM ERROR" in out

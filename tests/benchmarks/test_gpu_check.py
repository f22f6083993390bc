"""The GPU check where there is no GPU, and its judgement of made-up results."""

import json
import math
import os
import subprocess
import textwrap
from dataclasses import replace
from importlib import import_module

import psutil
import pytest
from launch_rig import wait_until

from benchmarks import gpu_check
from benchmarks.aot import programs
from benchmarks.gpu import kernels, steps, tokens
from benchmarks.gpu.part import Outcome, Setting
from semipd_jax.engine import Generation
from semipd_jax.errors import StartupError
from semipd_jax.launch import device
from semipd_jax.models.registry import parse_spec
from semipd_jax.request import FinishReason, TokenLogprob, Usage
from semipd_jax.tuner.work import Work


def result(device="NVIDIA H100 80GB HBM3", **changes):
    rows = []
    for target in kernels.TARGETS:
        slack = 0.9 if target.kind == "us" else 1.1
        rows.append(
            {
                "op": target.op,
                "case": target.case,
                "contender": "kernels_pallas mosaic_gpu",
                "problem": None,
                "timing": {"median_s": 1e-6 * slack * target.limit},
                "rate": 1e12 * slack * target.limit,
                "share": slack * target.limit,
            }
        )
    rows[0] |= changes
    return {"device": device, "rows": rows}


def test_targets_name_cases_that_exist():
    for target in kernels.TARGETS:
        assert programs.find_case(target.op, target.case)


def test_results_that_meet_all_targets_pass():
    assert not [*kernels.wrong_rows(result()), *kernels.missed_targets(result())]


def test_a_missed_target_is_named():
    (missed,) = kernels.missed_targets(result(share=0.5))
    assert missed == "64 rows of 2k: 0.5 share, at least 0.8 wanted"


def test_what_was_not_measured_is_missed():
    (missed,) = kernels.missed_targets(result(timing=None))
    assert missed == "64 rows of 2k: not measured"


def test_other_devices_have_no_targets():
    assert not list(kernels.missed_targets(result("NVIDIA A100-SXM4-80GB", share=0.1)))


@pytest.mark.parametrize(("contender", "count"), [("kernels_pallas triton", 1), ("FlashInfer", 0)])
def test_only_our_failures_count(contender, count):
    found = list(kernels.wrong_rows(result(contender=contender, problem="error 2e-1")))
    assert len(found) == count


def test_parts_are_listed_without_a_gpu(capsys):
    assert gpu_check.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in gpu_check.PARTS)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    def usable_gpu(run_dir):
        raise StartupError("no NVIDIA driver is here")

    monkeypatch.setattr(device, "usable_gpu", usable_gpu)
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err == "no GPU here: no NVIDIA driver is here\n"


def test_parts_are_modules_that_run():
    for name, (module, _) in gpu_check.PARTS.items():
        assert callable(import_module(module).run), name


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Writes a part; its name."""

    def write(text: str) -> str:
        (tmp_path / "some_part.py").write_text(textwrap.dedent(text))
        return "some_part"

    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:.")
    return write


CPU = Setting("cpu", "this machine", 0)


def test_what_a_package_lacks_is_named_in_one_line(part):
    outcome = gpu_check.run_part(part("import no_such_package"), CPU)
    assert outcome == Outcome(False, ("missing: the Python package no_such_package",))


def test_what_keeps_a_part_from_running_is_its_outcome(part):
    text = """
        from semipd_jax.errors import StartupError

        def run(setting):
            raise StartupError(f"nvidia-cuda-mps-control is not on PATH of {setting.name}")
    """
    outcome = gpu_check.run_part(part(text), CPU)
    assert outcome.found == ("nvidia-cuda-mps-control is not on PATH of this machine",)
    assert not outcome.passed


def test_a_part_that_dies_is_named(part):
    outcome = gpu_check.run_part(part("import os; os._exit(3)"), CPU)
    assert outcome == Outcome(False, ("ended with status 3; see its output above",))


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_part_that_hangs_is_ended_with_all_that_it_started(part, monkeypatch, tmp_path):
    text = f"""
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        with open("{tmp_path}/pid.new", "w") as file:
            file.write(str(child.pid))
        os.rename("{tmp_path}/pid.new", "{tmp_path}/pid")
        time.sleep(3600)
    """
    wait = subprocess.Popen.wait

    def wait_for_the_pid_only(process, timeout=None):
        if timeout is not None:
            wait_until((tmp_path / "pid").exists)
            timeout = 0.2
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_pid_only)
    outcome = gpu_check.run_part(part(text), CPU)
    assert outcome == Outcome(False, ("did not end within 600 s",))
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: is_gone(pid))


def test_result_is_a_table_and_a_file(part, capsys, monkeypatch, tmp_path):
    text = """
        from benchmarks.gpu.part import Outcome

        def run(setting):
            return Outcome(True, (f"all well on {setting.name}",), {"us": 1.5})
    """
    monkeypatch.setattr(gpu_check, "PARTS", {"mine": (part(text), "a part")})
    path = tmp_path / "result.json"
    assert gpu_check.main(["--rehearse", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "all well on a rehearsal on the CPU" in out
    assert out.rstrip().splitlines()[-1].split() == ["mine", "passed"]
    found = json.loads(path.read_text())
    assert found["parts"]["mine"]["details"] == {"us": 1.5}
    assert found["device"]["platform"] == "cpu"
    assert {"date", "commit", "versions"} <= found.keys()


# ---------------------------------------------------------------- tokens and steps


def generation(token_ids, tops):
    logprobs = tuple(
        TokenLogprob(token, dict(top)[token], tuple(top))
        for token, top in zip(token_ids, tops, strict=True)
    )
    return Generation(tuple(token_ids), "", logprobs, FinishReason.LENGTH, None, Usage(1, 2))


WANTED = generation([5, 7], [((5, -0.1), (6, -2.5)), ((7, -0.7), (8, -0.71))])


@pytest.mark.parametrize(
    ("token_ids", "gap"),
    [([5, 7], 0.0), ([5, 8], 0.01), ([6, 8], 2.4), ([9, 7], math.inf)],
)
def test_tokens_may_differ_only_where_the_reference_hardly_cares(token_ids, gap):
    found = tokens.compare("float32", [WANTED], [replace(WANTED, token_ids=tuple(token_ids))])
    assert math.isclose(found.worst_gap, gap, abs_tol=1e-9)
    assert found.num_equal == (token_ids == [5, 7])
    assert found.is_ok == (gap <= 0.02)


def test_floor_of_a_decode_step_is_weights_and_kv_of_a_prefill_step_flops():
    """Llama 3.1 8B on an H100: 15 GB of weights take 4.5 ms; 2048 tokens of 14 GFLOP 29 ms."""
    spec, peak = parse_spec(programs.LLAMA_8B), steps.PEAKS["H100"]
    kv = 2 * 2 * 8 * 128 * 32
    decode = steps.floor_s(spec, Work("decode", 64, 64, 64 * 2048, 64 * 2048), kv, 1.0, peak)
    assert math.isclose(decode, (15.0e9 + 64 * 2048 * kv) / 3.35e12, rel_tol=0.01)
    prefill = Work("prefill", 1, 2048, 2048, 2048 * 1024)
    whole = steps.floor_s(spec, prefill, kv, 1.0, peak)
    assert math.isclose(whole, 2 * 6.98e9 * 2048 / 989e12, rel_tol=0.01)
    assert math.isclose(steps.floor_s(spec, prefill, kv, 0.5, peak), 2 * whole)


def test_a_step_faster_than_its_floor_is_no_good_news():
    time = steps.StepTime("decode", 1.0, "132 of 132 SMs", 0.004, 0.005, num_compiles=0)
    assert len(steps.faults([time])) == 1
    assert steps.faults([replace(time, step_s=0.006)]) == []
    assert len(steps.faults([replace(time, step_s=0.006, num_compiles=1)])) == 1

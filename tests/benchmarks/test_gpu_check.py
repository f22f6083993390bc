"""The GPU check where there is no GPU, and its judgement of made-up results."""

import pytest

from benchmarks import gpu_check
from benchmarks.aot import programs
from benchmarks.gpu import kernels
from semipd_jax.errors import StartupError


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
    assert all(name in capsys.readouterr().out for name in gpu_check.PARTS)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    def describe(ordinal):
        raise StartupError("no NVIDIA driver is here")

    monkeypatch.setattr(gpu_check.cuda_driver, "describe", describe)
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err == "no GPU here: no NVIDIA driver is here\n"

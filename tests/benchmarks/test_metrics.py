"""Definitions against cases computed by hand."""

import pytest

from benchmarks.metrics import (
    Arrival,
    RequestRecord,
    Slo,
    distribution_ms,
    e2e_s,
    itl_s,
    meets,
    summarise,
    tpot_s,
    ttft_s,
)


def record(
    *arrivals: tuple[float, int], sent: float = 10.0, finished: float = 0.0, status: str = "OK"
) -> RequestRecord:
    return RequestRecord(
        scheduled_s=sent - 0.25,  # sent late: latencies count from the sending
        sent_s=sent,
        num_prompt_tokens=100,
        arrivals=[Arrival(at, tokens) for at, tokens in arrivals],
        finished_s=finished or (arrivals[-1][0] if arrivals else sent),
        status=status,
    )


def test_definitions_of_one_request() -> None:
    served = record((10.5, 1), (10.7, 1), (11.1, 2), finished=11.25)
    assert served.num_output_tokens == 4
    assert ttft_s(served) == pytest.approx(0.5)
    assert tpot_s(served) == pytest.approx(0.6 / 3)
    assert itl_s(served) == pytest.approx([0.2, 0.4])
    assert e2e_s(served) == pytest.approx(1.25)


def test_a_single_token_has_no_tpot_and_no_gaps() -> None:
    served = record((10.5, 1))
    assert tpot_s(served) is None
    assert itl_s(served) == []


def test_no_token_has_no_ttft() -> None:
    assert ttft_s(record(status="UNAVAILABLE")) is None


def test_percentiles_interpolate_and_skip_what_is_undefined() -> None:
    found = distribution_ms([0.001, None, 0.002, 0.003, 0.004, 0.005])
    assert found is not None
    assert found.count == 5
    assert found.mean == pytest.approx(3.0)
    assert found.p50 == pytest.approx(3.0)
    assert found.p90 == pytest.approx(4.6)  # between the 4th and 5th value, 0.6 of the way
    assert found.p99 == pytest.approx(4.96)
    assert distribution_ms([None]) is None


@pytest.mark.parametrize(
    ("slo", "expected"),
    [
        (Slo(), True),
        (Slo(ttft_s=0.5), True),  # the target itself is met
        (Slo(ttft_s=0.49), False),
        (Slo(tpot_s=0.25), True),
        (Slo(tpot_s=0.24), False),
        (Slo(ttft_s=0.5, tpot_s=0.24), False),
    ],
)
def test_slo_needs_every_target(slo: Slo, expected: bool) -> None:
    assert meets(record((10.5, 1), (10.75, 1), (11.0, 1)), slo) is expected


def test_slo_of_failed_and_of_single_token_requests() -> None:
    assert not meets(record((10.1, 1), status="ABORTED"), Slo())
    assert not meets(record(), Slo())
    assert meets(record((10.1, 1)), Slo(tpot_s=0.001))


def test_summary_counts_failures_as_misses_and_nothing_else() -> None:
    records = [
        record((1.0, 1), (2.0, 1), (3.0, 1), sent=0.0),  # TPOT 1 s
        record((2.0, 1), (4.0, 1), (5.0, 1), sent=1.0, finished=6.0),  # TPOT 1.5 s
        record((3.0, 1), sent=2.0, finished=8.0, status="UNAVAILABLE"),
        record(sent=2.0, finished=2.5, status="RESOURCE_EXHAUSTED"),
        record(sent=2.0, finished=2.5, status="RESOURCE_EXHAUSTED"),
    ]
    found = summarise(records, Slo(ttft_s=1.0, tpot_s=1.0))
    assert found.num_requests == 5
    assert found.failures == {"UNAVAILABLE": 1, "RESOURCE_EXHAUSTED": 2}
    assert found.duration_s == 8.0  # from the first send to the last end, failures included
    assert found.num_output_tokens == 6
    assert found.num_prompt_tokens == 200
    assert found.requests_per_s == pytest.approx(2 / 8)
    assert found.output_tokens_per_s == pytest.approx(6 / 8)
    assert found.total_tokens_per_s == pytest.approx(206 / 8)
    assert found.slo_attainment == pytest.approx(1 / 5)
    ttft, tpot, itl, e2e = (
        found.latencies.ttft_ms,
        found.latencies.tpot_ms,
        found.latencies.itl_ms,
        found.latencies.e2e_ms,
    )
    assert ttft is not None
    assert ttft.mean == pytest.approx(1000)
    assert tpot is not None
    assert tpot.p50 == pytest.approx(1250)
    assert itl is not None
    assert itl.count == 4  # pooled: 1, 1, 2, 1 seconds
    assert itl.mean == pytest.approx(1250)
    assert e2e is not None
    assert e2e.mean == pytest.approx(4000)


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no requests"):
        summarise([], Slo())

import pytest

from semipd_jax import simulate
from semipd_jax.errors import ConfigError
from semipd_jax.simulator.traces import TraceRow
from semipd_jax.simulator.workloads import Workload


def workload(*arrivals_s: float) -> Workload:
    rows = (TraceRow(arrival_s=at, input_len=1, output_len=1) for at in arrivals_s)
    return Workload("some", tuple(rows))


def test_rates_are_between_the_first_request_and_the_last():
    assert workload(1.0, 1.5, 3.0).rate == 1.0
    assert [row.arrival_s for row in workload(1.0, 1.5, 3.0).at(2.0).rows] == [0.5, 0.75, 1.5]


@pytest.mark.parametrize("arrivals_s", [(0.0,), (5.0, 5.0)])
def test_requests_at_one_time_have_no_rate(arrivals_s):
    with pytest.raises(ConfigError, match="load is 'some'; allowed: requests at two times"):
        _ = workload(*arrivals_s).rate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--num-requests 1", "load is 'sharegpt'"),
        ("--num-requests 0", "num_requests is 0; allowed: at least 1"),
        ("--workload flipping --flip-every 0", "flip_every is 0; allowed: at least 1"),
    ],
)
def test_the_command_says_so(given: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert simulate.main(given.split()) == 2
    assert message in capsys.readouterr().err

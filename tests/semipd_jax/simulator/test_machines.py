import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelled_profile import TRUTH

from semipd_jax.config import PHASES
from semipd_jax.errors import ConfigError
from semipd_jax.simulator import hardware
from semipd_jax.simulator.calibration import calibrated, samples
from semipd_jax.simulator.device import Device
from semipd_jax.simulator.machine import Load
from semipd_jax.simulator.profiled import Profiled
from semipd_jax.simulator.roofline import Roofline
from semipd_jax.tuner.latency import FEATURES, LatencyModel
from semipd_jax.tuner.profile import mean_error
from semipd_jax.tuner.work import Work

SHARINGS = ("normalised", "conserving")


def prefill(tokens: int, cached: int = 0) -> Work:
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    return Work("prefill", 1, tokens, tokens + cached, pairs)


def decode(rows: int, context: int) -> Work:
    return Work("decode", rows, rows, rows * context, rows * context)


def h100(sharing="normalised") -> Roofline:
    return Roofline(hardware.read("h100-llama-3-8b"), sharing)


# ------------------------------------------------------------ descriptions


def test_shipped_descriptions_say_that_they_are_modelled():
    assert hardware.shipped() == [
        "h100-llama-3-70b-tp4",
        "h100-llama-3-8b",
        "h200-llama-3-70b-tp4",
        "h200-llama-3-8b",
    ]
    for name in hardware.shipped():
        described = hardware.read(name)
        assert described.source == "modelled"
        assert "Not measured" in described.notes[0]


@pytest.mark.parametrize(
    ("name", "billions"), [("h100-llama-3-8b", 8.03), ("h200-llama-3-70b-tp4", 70.55)]
)
def test_shapes_have_the_published_sizes(name, billions):
    shape = hardware.read(name).shape
    assert shape.weight_bytes / 2e9 == pytest.approx(billions, rel=1e-3)
    # K and V, 8 heads of 128 bfloat16 values, per layer.
    assert shape.kv_bytes_per_token == 2 * 8 * 128 * 2 * shape.num_layers


def test_processes_take_memory_from_the_pool():
    described = hardware.read("h100-llama-3-8b")
    one, ten = (described.kv_tokens(num_processes=n) for n in (1, 10))
    expected = 9 * described.device.process_bytes / described.shape.kv_bytes_per_token
    assert one - ten == pytest.approx(expected, abs=1)
    with pytest.raises(ConfigError, match="num_processes is 200"):
        described.kv_tokens(num_processes=200)


def test_unknown_and_broken_descriptions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="h100-llama-3-8b"):
        hardware.read("h300")
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": "semipd.hardware/1"}')
    with pytest.raises(ConfigError, match="missing required field"):
        hardware.read(str(broken))


# ------------------------------------------------------------ roofline


def test_a_small_decode_step_takes_as_long_as_reading_the_weights():
    """All but the embedding, 7.5 billion parameters, at 3.35 TB/s, 1.61 times, and 0.5 ms."""
    machine = h100()
    read_s = (8.03e9 - 128256 * 4096) * 2 / 3.35e12
    seconds = machine.alone_s(machine.load((decode(1, 1),)), 1.0)
    assert seconds == pytest.approx(1.61 * read_s + 0.5e-3, rel=0.01)


def test_a_large_prefill_step_takes_as_long_as_its_arithmetic():
    machine = h100()
    seconds = machine.alone_s(machine.load((prefill(4096),)), 1.0)
    flops = 2 * 4096 * 6.98e9 + 4 * 32 * 4096 * 4096**2 / 2
    assert seconds == pytest.approx(1.61 * flops / 989e12, rel=0.03)


def test_tensor_parallel_devices_divide_the_work_and_pay_for_talking():
    machine = Roofline(hardware.read("h100-llama-3-70b-tp4"))
    load = machine.load((decode(1, 1),))
    assert load.fixed_s >= 0.5e-3 + 160 * machine.hardware.device.allreduce_s
    read_s = (70.55e9 - 128256 * 8192) * 2 / (4 * 3.35e12)
    assert machine.alone_s(load, 1.0) - load.fixed_s == pytest.approx(1.61 * read_s, rel=0.01)


works = st.one_of(
    st.builds(prefill, st.integers(1, 8192), st.integers(0, 8192)),
    st.builds(decode, st.integers(1, 512), st.integers(1, 8192)),
)
shares = st.floats(0.05, 1.0)


@settings(max_examples=60)
@given(works, works, shares, shares, shares, st.sampled_from(SHARINGS))
def test_shares_act_in_the_right_direction(own, neighbour, a, b, other, sharing):
    machine = h100(sharing)
    load, beside = machine.load((own,)), machine.load((neighbour,))
    less, more = sorted((a, b))
    assert machine.alone_s(load, more) <= machine.alone_s(load, less)
    beside_s, _ = machine.together_s(load, less, beside, other)
    assert machine.alone_s(load, less) <= beside_s * (1 + 1e-9)


@settings(max_examples=40)
@given(works, works, st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_ways_of_sharing_differ_only_in_what_does_not_fit(own, neighbour, a, b):
    times = []
    for sharing in SHARINGS:
        machine = h100(sharing)
        times.append(machine.together_s(machine.load((own,)), a, machine.load((neighbour,)), b))
    assert times[0] == times[1]


def test_memory_bound_and_compute_bound_steps_hardly_meet():
    """Sharing that conserves gives prefill what decode's waiting leaves; normalising gives half."""
    alone_s = h100().alone_s(h100().load((prefill(2048),)), 1.0)
    slowdowns = {}
    for sharing in SHARINGS:
        machine = h100(sharing)
        loads = machine.load((prefill(2048),)), machine.load((decode(32, 1000),))
        slowdowns[sharing] = machine.together_s(loads[0], 1.0, loads[1], 1.0)[0] / alone_s
    assert slowdowns["normalised"] == pytest.approx(2.0, abs=0.1)
    assert slowdowns["conserving"] < 1.3


def test_a_fused_step_reads_the_weights_once():
    machine = h100()
    fused = machine.alone_s(machine.load((decode(32, 500), prefill(256))), 1.0)
    apart = sum(
        machine.alone_s(machine.load((work,)), 1.0) for work in (decode(32, 500), prefill(256))
    )
    assert fused < 0.75 * apart


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_tuner_can_learn_the_machine(sharing):
    machine = h100(sharing)
    limits = {"max_tokens": 2048, "max_rows": 256}
    model = calibrated(machine, saturation=1 / 3, **limits)
    errors = mean_error(model, samples(machine, **limits))
    assert max(errors.values()) < 0.2
    assert (model.yielding["prefill"] > 0.5) == (sharing == "conserving")


def test_a_profile_is_a_machine_too():
    model = calibrated(h100(), saturation=1 / 3, max_tokens=2048, max_rows=256)
    machine = Profiled(model)
    own, other = machine.load((prefill(1024),)), machine.load((decode(64, 500),))
    assert machine.alone_s(own, 0.5) == model.terms(prefill(1024)).at(0.5, 0.0)
    together = machine.together_s(own, 0.5, other, 1.0)
    assert together == (
        model.terms(prefill(1024)).at(0.5, 1.0),
        model.terms(decode(64, 500)).at(1.0, 0.5),
    )
    fused = machine.alone_s(machine.load((decode(64, 500), prefill(1024))), 1.0)
    apart = machine.alone_s(own, 1.0) + machine.alone_s(other, 1.0)
    assert max(machine.alone_s(own, 1.0), machine.alone_s(other, 1.0)) < fused < apart


@pytest.mark.parametrize("dear", PHASES)
@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("tokens", [16, 512])
def test_a_fused_step_of_a_profile_takes_longer_than_either_part(dear, rows, tokens):
    """Whichever phase's steps take longer, however small they are."""
    values = {phase: TRUTH[phase].copy() for phase in PHASES}
    values[dear][list(FEATURES[dear]).index("weights")] *= 10
    model = LatencyModel(values, 0.3, dict.fromkeys(PHASES, 0.0))
    machine, parts = Profiled(model), (decode(rows, 500), prefill(tokens))
    for share in (0.2, 1.0):
        times = [machine.alone_s(machine.load((part,)), share) for part in parts]
        assert max(times) < machine.alone_s(machine.load(parts), share) < sum(times)


def test_a_fused_step_of_a_profile_pays_for_matrices_once_and_for_its_padding():
    """`batched` is what products with matrices cost more than those with a vector; the chunk's are
    with matrices anyway."""
    values = {phase: np.zeros(len(FEATURES[phase])) for phase in PHASES}
    for phase, name, seconds in (
        ("prefill", "products", 0.2),
        ("prefill", "tokens", 1.0),  # per thousand
        ("decode", "batched", 0.15),
        ("decode", "rows", 1.0),  # per hundred
    ):
        values[phase][list(FEATURES[phase]).index(name)] = seconds
    padding = {"prefill": (500, 1000), "decode": (1, 4, 8, 16, 32)}
    machine = Profiled(LatencyModel(values, 1.0, dict.fromkeys(PHASES, 0.0), padding))
    for rows, padded in ((1, 8), (4, 8), (8, 8), (9, 32), (32, 32)):
        fused = machine.load((decode(rows, 10), prefill(400)))
        assert machine.alone_s(fused, 1.0) == pytest.approx(0.2 + 0.5 + padded / 100)
    assert machine.alone_s(machine.load((decode(1, 10),)), 1.0) == pytest.approx(0.01)


# ------------------------------------------------------------ device


class Halves:
    """Every step takes 1 s alone and 2 s beside another one."""

    def load(self, works):
        return Load(works)

    def alone_s(self, load, share):
        return 1.0

    def together_s(self, a, share_a, b, share_b):
        return 2.0, 2.0


class Alone(Halves):
    """Every step takes 1 s."""

    def together_s(self, a, share_a, b, share_b):
        return 1.0, 1.0


def run_device(device: Device, most: int = 20) -> list[tuple[float, int, str]]:
    done = []
    for _ in range(most):
        now = device.next_s
        if now == math.inf:
            return done
        done += [(now, lane, job.worker_id) for lane, job in device.advance(now)]
    raise AssertionError("the device never comes to rest")


def test_steps_of_a_lane_run_one_after_another_and_lanes_side_by_side():
    device = Device(Halves(), num_lanes=2, hop_s=0.25, noise=0.0, seed=0)
    for name in ("a", "b"):
        device.send(0, name, 0, 0, Load(()), 1.0)
    assert device.next_s == 0.25
    device.advance(0.25)  # a starts
    assert device.advance(1.0) == []
    device.send(1, "c", 0, 0, Load(()), 1.0)
    # At 1.25 a is done and b starts; c has just started too. Both take 2 s, so b ends with c.
    assert run_device(device) == [(1.25, 0, "a"), (3.25, 0, "b"), (3.25, 1, "c")]
    assert device.busy_s == [3.0, 2.0]


def test_a_step_slows_down_only_while_the_other_lane_runs():
    device = Device(Halves(), num_lanes=2, hop_s=0.0, noise=0.0, seed=0)
    device.send(0, "a", 0, 0, Load(()), 1.0)
    device.advance(0.5)
    device.send(1, "b", 0, 0, Load(()), 1.0)
    # Half of a is left, at half speed until 1.5; b has then run half, and ends alone at 2.
    assert run_device(device) == [(1.5, 0, "a"), (2.0, 1, "b")]


def test_other_processes_of_a_cpu_hold_up_lanes_by_their_shares():
    device = Device(Alone(), num_lanes=2, hop_s=0.0, noise=0.0, seed=0, host_s=0.01)
    device.send(0, "a", 0, 5, Load(()), 0.5)
    device.send(0, "b", 0, 0, Load(()), 0.5)
    device.advance(0.5)
    device.send(1, "c", 0, 0, Load(()), 1.0)
    # The five tokens of a take 50 ms of a core: all of them from c, half of them from b.
    assert run_device(device) == [
        (1.0, 0, "a"),
        (pytest.approx(1.55), 1, "c"),
        (pytest.approx(2.025), 0, "b"),
    ]


def test_noise_is_of_the_seed():
    def ends(seed: int) -> list[float]:
        device = Device(Halves(), num_lanes=1, hop_s=0.0, noise=0.1, seed=seed)
        for _ in range(5):
            device.send(0, "", 0, 0, Load(()), 1.0)
        return [at for at, _, _ in run_device(device)]

    assert ends(1) == ends(1)
    assert ends(1) != ends(2)

"""`python -m semipd_jax.profile`, from the command line to the file, on workers without jax."""

import threading
from dataclasses import replace

import pytest
from fake_timed_worker import STEP_S
from launch_rig import FAKES, config, unwoken_signal

from benchmarks.processes import engine_processes
from semipd_jax import profile
from semipd_jax.launch.launcher import Launcher
from semipd_jax.tuner.latency import Conditions
from semipd_jax.tuner.profile import model_of
from semipd_jax.tuner.setup import load_profile
from semipd_jax.tuner.work import Work

pytestmark = pytest.mark.usefixtures("restored_logs")

LIMITS = ["--share-ladder=0.5,1.0", "--max-num-seqs=2", "--max-num-batched-tokens=16"]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    def modules(*, coordinator):
        return replace(FAKES, worker="fake_timed_worker", coordinator=coordinator)

    monkeypatch.setattr(profile, "Modules", modules)


def test_the_command_measures_every_share_and_writes_what_fits(tmp_path, capsys):
    path = tmp_path / "profile.json"
    assert profile.main([*LIMITS, "--output", str(path)]) == 0
    assert engine_processes() == {}
    assert "mean error of the fit" in capsys.readouterr().out
    made = load_profile(str(path))
    assert made.source == "measured"
    assert made.rungs == {"prefill": (0.5, 1.0), "decode": (0.5, 1.0)}
    model = model_of(made)
    one_row = Work("decode", 1, 1, 64, 64)
    assert model.predict(one_row, Conditions(1.0)) == pytest.approx(STEP_S, rel=0.3)
    assert model.predict(one_row, Conditions(0.5)) == pytest.approx(2 * STEP_S, rel=0.3)


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys):
    path = tmp_path / "nowhere" / "profile.json"
    assert profile.main([*LIMITS, "--output", str(path)]) == 2
    assert "output is" in capsys.readouterr().err


def test_a_ladder_of_one_share_is_refused(capsys):
    assert profile.main([]) == 2
    assert "share_ladder" in capsys.readouterr().err


def test_a_signal_that_wakes_no_thread_interrupts_it(monkeypatch):
    has_started = threading.Event()

    class Endless(Launcher):
        def start(self):
            has_started.set()

    monkeypatch.setattr(profile, "Launcher", Endless)
    with unwoken_signal(has_started.is_set), pytest.raises(KeyboardInterrupt):
        profile.measure(config(), profile._Bar())

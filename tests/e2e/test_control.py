"""ControlService of a running server, over its private socket."""

import re
import signal
import threading
from pathlib import Path

import msgspec
import pytest
from modelled_profile import save_profile
from serve_rig import Server, serving

from semipd_jax.errors import EngineError, InvalidRequestError, UnavailableError
from semipd_server.client import Client
from semipd_server.control_client import ControlClient

FLAGS = ("--share-ladder=0.5,1.0", "--slo-ttft-ms=1000", "--slo-tpot-ms=25")


def generate(target: str) -> list[str]:
    """What streams bring that decode while others are prefilled."""
    texts = [""] * 6
    with Client(target) as client:

        def one(i: int) -> None:
            options = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
            texts[i] = client.complete([5 + i] * (10 + 60 * i), timeout_s=120, **options)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return texts


@pytest.mark.timeout(600)
def test_an_operator_watches_and_changes_what_serves(compile_cache, tmp_path: Path):
    profile = save_profile(tmp_path / "profile.json")
    flags = (*FLAGS, "--tuner-profile", profile, "--compile-cache-dir", compile_cache)
    with serving(tmp_path / "log", *flags) as server:
        target = server.wait_for(r"is served at (\S+) after")[1]
        socket = server.wait_for(r"control socket: (unix:\S+)")[1]
        with ControlClient(socket) as control:
            predicted = generate(target)
            check_decisions(control, server)
            static = control.set_partition(prefill_share=0.5, decode_share=0.5)
            assert (static.policy, static.HasField("choice")) == ("static", False)
            assert generate(target) == predicted
            assert control.set_partition(policy="semi-pd").policy == "semi-pd"
            check_promises(control)
            check_end(control, server)


def check_decisions(control: ControlClient, server: Server) -> None:
    stats = next(control.watch(interval_ms=100))
    assert stats.partition.policy == "predictive"
    assert list(stats.partition.decode.warm) == [0.5, 1.0]
    assert stats.slo.ended == stats.recent.ended == 6
    assert stats.decode.predictions > 0
    assert stats.decode.prediction_error_mean > 0
    assert stats.pages.used == 0
    record = server.wait_for(r"share changes: (\{.*\})", timeout_s=60)[1]
    told = msgspec.json.decode(record)
    assert told["policy"] == "predictive"
    assert told["predicted_decode_s"] > 0
    assert told["inputs"]["budget_s"] == pytest.approx(0.9 * 0.025)


def check_promises(control: ControlClient) -> None:
    promised = control.set_slo(ttft_ms=500, tpot_ms=50, target=0.95)
    assert (promised.slos[0].ttft_ms, promised.slo_target) == (500, 0.95)
    with pytest.raises(InvalidRequestError, match="slo_ttft_ms and slo_tpot_ms"):
        control.set_slo(ttft_ms=500)
    assert control.partition().slos[0].tpot_ms == 50


def check_end(control: ControlClient, server: Server) -> None:
    """A watch does not keep a server from ending."""
    watch = control.watch(interval_ms=100)
    next(watch)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(UnavailableError):
        for _ in watch:
            pass
    assert server.process.wait(60) == 0
    assert not re.search("Traceback", server.log)
    with pytest.raises(EngineError):
        control.partition()

"""Real worker processes over real shared memory; this process plays owner and coordinator."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import threading
import time

import msgspec
import numpy as np
import pytest
from step_cases import (
    TINY_CONFIG,
    abstract_state,
    columns,
    decode_message,
    dense_greedy,
    prefill_message,
    tiny_layout,
    tiny_model,
)

from semipd_jax.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from semipd_jax.launch.process import Exited, Process
from semipd_jax.messages import (
    ChildSpec,
    Failed,
    FromWorker,
    Progress,
    Ready,
    StepDone,
    ToWorker,
    WorkerReady,
)
from semipd_jax.models.module import flatten
from semipd_jax.storage.cpu import HostMemory
from semipd_jax.storage.manifest import STATE, WEIGHTS, lay_out
from semipd_jax.storage.server import MemoryServer
from semipd_jax.transport.channels import WORKERS, Hub, Poller

TIMEOUT_S = 240
SPEC, _, PARAMS = tiny_model()
LAYOUT = tiny_layout(SPEC, num_rows=5)


class Engine:
    """The memory owner and the coordinator of a test."""

    def __init__(self, directory):
        run_dir = directory / "run"
        run_dir.mkdir(mode=0o700)
        model_dir = directory / "model"
        model_dir.mkdir()
        (model_dir / "config.json").write_text(json.dumps(TINY_CONFIG))
        self.run_dir = str(run_dir)
        self.config = EngineConfig(
            model=ModelConfig(path=str(model_dir)),
            cache=CacheConfig(page_size=LAYOUT.page_size),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32),
            compile_cache_dir=str(directory / "programs"),
        )
        self.memories = [_weights(), _state()]
        self.hub = Hub[FromWorker, ToWorker](self.run_dir, WORKERS, FromWorker)
        self.events = queue.SimpleQueue()
        self.poller = Poller()
        self.poller.add(self.hub)
        self.processes = []

    def start(self, worker_id, phase, **changes):
        spec = ChildSpec(
            name=f"{phase} worker",
            run_dir=self.run_dir,
            config=self.config,
            layout=LAYOUT,
            lane=phase,
            share=1.0,
            extra={"worker_id": worker_id},
        )
        process = Process(
            "semipd_jax.worker",
            msgspec.structs.replace(spec, **changes),
            self.events,
        )
        self.processes.append(process)
        return process

    def receive(self, kind):
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            self.poller.wait(0.5)
            for _, message in self.hub.receive():
                assert isinstance(message, kind), message
                return message
            assert all(p._popen.poll() is None for p in self.processes), "a worker died"
        raise TimeoutError(f"no {kind}")

    def heard(self, process, kind):
        """The next `kind` that a process reports."""
        while True:
            source, message = self.events.get(timeout=TIMEOUT_S)
            if source is process and isinstance(message, kind):
                return message

    def tokens(self):
        with self.memories[1].writing("tokens") as tokens:
            return np.array(tokens)


def _weights():
    leaves = flatten(PARAMS)
    region = lay_out(WEIGHTS, [(path, leaf.shape, "float32") for path, leaf in leaves.items()])
    memory = HostMemory(region)
    for path, leaf in leaves.items():
        with memory.writing(path) as array:
            array[...] = leaf
    return memory


def _state():
    state = abstract_state(SPEC, LAYOUT)
    arrays = [
        (f"layers/{i}/{name}", array.shape, "float32")
        for i, layer in enumerate(state.layers)
        for name, array in layer.items()
    ]
    return HostMemory(
        lay_out(STATE, [*arrays, ("tokens", state.tokens.shape, "int32")], writable=True)
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engine")
    directory.chmod(0o700)
    engine = Engine(directory)
    with contextlib.closing(MemoryServer(engine.run_dir, engine.memories)) as server:

        def answer():
            while True:
                try:
                    server.answer()
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        yield engine
        for process in engine.processes:
            process.kill()
        engine.hub.close()


@pytest.fixture(scope="module")
def workers(engine):
    """A prefill and a decode worker, ready."""
    started = {phase: engine.start(f"{phase}-1", phase) for phase in ("prefill", "decode")}
    ready = {engine.receive(WorkerReady).lane for _ in started}
    assert ready == {"prefill", "decode"}
    for process in started.values():
        engine.heard(process, Ready)
    return started


PROMPT = [5, 17, 40, 8, 61, 33, 72, 9, 12, 80, 3, 44, 29, 51, 66, 7, 90, 15, 23, 38]
PAGES = [11, 4, 30]


def prefill(engine, row, step_id):
    """Prefills PROMPT in two chunks and returns the first generated token."""
    for i, (start, end) in enumerate(((0, 11), (11, len(PROMPT)))):
        last = end == len(PROMPT)
        message = prefill_message([(row, PAGES, PROMPT, start, end, last)], step_id=step_id + i)
        assert engine.hub.send("prefill-1", message)
        reply = engine.receive(StepDone)
        assert (reply.worker_id, reply.step_id) == ("prefill-1", step_id + i)
    return np.frombuffer(reply.token_ids, np.int32).tolist()


def decode_steps(row, num_steps, *, first_id, **changes):
    return [
        decode_message([(row, PAGES, len(PROMPT) + 1 + i)], step_id=first_id + i, **changes)
        for i in range(num_steps)
    ]


def test_prefill_and_decode_processes_generate_over_one_memory(engine, workers):
    expected = dense_greedy(PROMPT, 12)
    generated = prefill(engine, 2, 100)
    steps = decode_steps(2, 11, first_id=200)
    for step in steps[:2]:  # two in flight, as the coordinator keeps it
        engine.hub.send("decode-1", step)
    for i in range(len(steps)):
        reply = engine.receive(StepDone)
        assert (reply.worker_id, reply.step_id) == ("decode-1", 200 + i)
        assert reply.num_compiles == 0
        assert 0 < reply.device_s < TIMEOUT_S
        assert reply.logprobs is None
        generated += np.frombuffer(reply.token_ids, np.int32).tolist()
        if i + 2 < len(steps):
            engine.hub.send("decode-1", steps[i + 2])
    assert generated == expected
    assert engine.tokens()[2, : len(PROMPT) + 12].tolist() == PROMPT + expected


def test_log_probabilities_of_the_steps_rows(engine, workers):
    prefill(engine, 3, 300)
    table = columns(1, num_logprobs=2)
    (step,) = decode_steps(3, 1, first_id=310, sampling=table)
    engine.hub.send("decode-1", step)
    reply = engine.receive(StepDone)
    assert reply.logprobs is not None
    top = np.frombuffer(reply.logprobs.top_logprobs, np.float32)
    assert np.frombuffer(reply.logprobs.sampled, np.float32) == top[0]
    assert (np.diff(top) <= 0).all()


def test_a_killed_worker_is_replaced_and_its_step_is_run_again(engine, workers):
    table = columns(1, temperature=1.0, seed=77)
    prefill(engine, 1, 400)
    steps = decode_steps(1, 6, first_id=410, sampling=table)
    expected = []
    for step in steps:
        engine.hub.send("decode-1", step)
        expected.append(engine.receive(StepDone).token_ids)

    for step in steps[:2]:
        engine.hub.send("decode-1", step)
    victim = workers["decode"]
    engine.processes.remove(victim)
    os.kill(victim.pid, signal.SIGKILL)
    assert engine.heard(victim, Exited).status == -signal.SIGKILL

    def from_the_new_one():
        """Skips what the victim may have said before."""
        while (message := engine.receive(WorkerReady | StepDone)).worker_id != "decode-2":
            assert isinstance(message, StepDone)
            assert message.worker_id == "decode-1"
        return message

    engine.start("decode-2", "decode")
    assert isinstance(from_the_new_one(), WorkerReady)
    got = []
    for step in steps:
        engine.hub.send("decode-2", step)
        got.append(from_the_new_one().token_ids)
    assert got == expected


def test_stop_comes_after_the_last_answer(engine, workers):
    process = engine.start("prefill-2", "prefill")
    assert engine.receive(WorkerReady).worker_id == "prefill-2"
    message = prefill_message([(4, [20, 21], PROMPT, 0, len(PROMPT), True)], step_id=500)
    engine.hub.send("prefill-2", message)
    assert engine.receive(StepDone).step_id == 500
    process.ask_to_stop()
    assert engine.heard(process, Exited).status == 0
    engine.processes.remove(process)


def test_start_reports_every_bucket_and_a_bad_step_ends_the_process(engine, workers):
    process = engine.start("prefill-3", "prefill")
    said = []
    while not said or not isinstance(said[-1], Ready):
        said.append(engine.heard(process, Progress | Ready))
    compiled = [m for m in said[:-1] if m.stage == "compile"]
    assert [(m.done, m.total) for m in compiled] == [(0, 1), (1, 1)]

    assert engine.receive(WorkerReady).worker_id == "prefill-3"
    engine.processes.remove(process)
    good = prefill_message([(4, [20, 21], PROMPT, 0, len(PROMPT), True)], step_id=599)
    too_long = prefill_message([(4, [20, 21, 22], PROMPT * 2, 0, 40, True)], step_id=600)
    engine.hub.send("prefill-3", good)
    engine.hub.send("prefill-3", too_long)
    assert engine.receive(StepDone).step_id == 599
    assert "allowed: at most 32 tokens in 4 rows" in engine.heard(process, Failed).message
    assert engine.heard(process, Exited).status == 1


def test_worker_on_a_cpu_is_quiet_about_gpus(engine, workers, monkeypatch, capfd):
    """An installed plugin complains if there is no GPU, unless it is told that none is wanted."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    process = engine.start("prefill-5", "prefill")
    assert engine.receive(WorkerReady).worker_id == "prefill-5"
    process.ask_to_stop()
    assert engine.heard(process, Exited).status == 0
    engine.processes.remove(process)
    assert capfd.readouterr().err == ""


def test_weights_of_another_model_are_refused(engine, tmp_path):
    other = tmp_path / "config.json"
    other.write_text(json.dumps(TINY_CONFIG | {"intermediate_size": 64}))
    model = dataclasses.replace(engine.config.model, path=str(tmp_path))
    process = engine.start(
        "prefill-4", "prefill", config=dataclasses.replace(engine.config, model=model)
    )
    engine.processes.remove(process)
    failed = engine.heard(process, Failed)
    assert failed.kind == "StartupError"
    assert "layers/0/mlp/down_proj" in failed.message
    assert engine.heard(process, Exited).status == 1

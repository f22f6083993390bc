"""Which processes are started, without any."""

from launch_rig import config

from semipd_jax.config import ShareConfig
from semipd_jax.launch.process import Process
from semipd_jax.launch.workers import Workers, WorkerSlot
from semipd_jax.messages import WorkerLost


class FakeProcess(Process):
    def __init__(self, name: str) -> None:
        self.name = name

    def ask_to_stop(self) -> None:
        pass


class Started:
    """Workers of prefill, and of decode at 0.5 and 1.0; all are ready."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.lost: list[WorkerLost] = []
        self.workers = Workers(
            config(shares=ShareConfig(prefill=1.0, decode=0.5, decode_ladder=(1.0,))),
            start=self._start,
            kill=lambda process: None,
            tell=self.lost.append,
            is_fate_shared=lambda: True,
        )
        for lane in ("prefill", "decode"):
            self.workers.start_next(lane)
        while waiting := [s for s in self.workers.slots if s.process and not s.is_ready]:
            self.workers.ready(waiting[0], None)
        self.workers.is_running = True

    def _start(self, slot: WorkerSlot) -> Process:
        self.started.append(slot.name)
        return FakeProcess(slot.name)

    def slot(self, name: str) -> WorkerSlot:
        return next(slot for slot in self.workers.slots if slot.name == name)

    def exits(self, slot: WorkerSlot, status: int) -> None:
        assert slot.process is not None
        self.workers.exited(slot.process, status, None)


def test_who_waits_for_others_to_leave_is_started_once():
    """A worker that is new gets ready while it is asked to leave, for another one's fault."""
    rig = Started()
    half, whole = rig.slot("decode worker 0.50"), rig.slot("decode worker 1.00")
    rig.exits(half, -9)
    rig.exits(whole, 1)
    rig.workers.add("decode", 0.7)
    rig.workers.ready(half, None)
    assert "decode worker 0.70" not in rig.started
    rig.exits(half, 0)
    rig.exits(rig.slot("prefill worker 1.00"), 0)
    assert rig.started.count("decode worker 0.70") == 1
    assert len(rig.workers.alive) == len(rig.workers.slots) == 4


def test_who_leaves_for_the_fault_of_another_is_not_to_blame():
    """Whatever it ends with: it may hear of the fault before it is asked to leave."""
    rig = Started()
    names = "decode worker 1.00", "decode worker 0.50", "prefill worker 1.00"
    slots = [rig.slot(name) for name in names]
    ids = [slot.worker_id for slot in slots]
    for slot, status in zip(slots, (1, 0, 1), strict=True):
        rig.exits(slot, status)
    assert [(lost.worker_id, lost.is_to_blame) for lost in rig.lost] == [
        (ids[0], True),
        (ids[1], False),
        (ids[2], False),
    ]
    rig.workers.ready(slots[1], None)
    rig.exits(slots[1], -9)
    assert rig.lost[-1].is_to_blame, "what it was asked before says nothing of its replacement"

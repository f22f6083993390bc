"""A lane's workers, which of them gets the next step, and the steps in flight."""

from collections import deque
from dataclasses import dataclass, field

from semipd_jax.config import Lane


@dataclass(slots=True)
class LaneWorkers:
    """One lane's ready workers, each at its own share, and the steps in flight, oldest first.

    Only one worker holds steps at a time: a step reads what the one before it wrote, and only
    within one worker does the device keep their order. So a move to another share waits for the
    replies to the steps in flight, and costs no more than that.

    Attributes:
      wanted: the share to run at; the ready worker that comes closest to it gets the next step.
      shares: the share of each ready worker, by id.
      holder: who got the last step.
      running_since_s: when the oldest step was sent, or became the oldest.
      num_switches: steps that went to another worker than the one before, both being there.
    """

    lane: Lane
    wanted: float = 1.0
    shares: dict[str, float] = field(default_factory=dict[str, float])
    holder: str | None = None
    step_ids: deque[int] = field(default_factory=deque[int])
    running_since_s: float | None = None
    num_switches: int = 0

    @property
    def share(self) -> float | None:
        """Of the worker that got the last step, if it is still there."""
        return self.shares.get(self.holder) if self.holder is not None else None

    def next_worker(self, depth: int) -> str | None:
        """Who may be sent a step now, if up to `depth` may be in flight."""
        if not self.shares or len(self.step_ids) >= depth:
            return None
        if self.share == self.wanted:
            return self.holder
        closest = min(
            self.shares, key=lambda i: (abs(self.shares[i] - self.wanted), -self.shares[i])
        )
        return closest if closest == self.holder or not self.step_ids else None

    def at(self, share: float) -> str | None:
        """The ready worker at exactly this share."""
        return next((i for i, s in self.shares.items() if s == share), None)

    def sent(self, worker_id: str, step_id: int, now_s: float) -> None:
        if worker_id != self.holder:
            self.num_switches += self.holder in self.shares
            self.holder = worker_id
        self.step_ids.append(step_id)
        if len(self.step_ids) == 1:
            self.running_since_s = now_s

    def answered(self, worker_id: str, step_id: int, now_s: float) -> bool:
        """Takes the oldest step off. False if the reply is not from whom and what is expected."""
        if worker_id != self.holder or not self.step_ids or self.step_ids[0] != step_id:
            return False
        self.step_ids.popleft()
        self.running_since_s = now_s if self.step_ids else None
        return True

    def remove(self, worker_id: str) -> list[int]:
        """The worker is gone, or going: returns the steps it had."""
        self.shares.pop(worker_id, None)
        if worker_id != self.holder:
            return []
        lost = list(self.step_ids)
        self.holder = None
        self.step_ids.clear()
        self.running_since_s = None
        return lost

    def spare(self, kept: frozenset[float]) -> list[str]:
        """Workers that hold no step, at shares that are neither `kept` nor wanted."""
        return [
            worker
            for worker, share in self.shares.items()
            if share not in kept
            and share != self.wanted
            and not (worker == self.holder and self.step_ids)
        ]

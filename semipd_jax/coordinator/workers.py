"""Which worker serves each phase, which steps it holds, and since when."""

from collections import deque
from dataclasses import dataclass, field

from semipd_jax.messages import Phase


@dataclass(slots=True)
class PhaseWorkers:
    """One phase's worker and its steps in flight, oldest first.

    Attributes:
      running_since_s: when the oldest step was sent, or became the oldest.
    """

    phase: Phase
    worker_id: str | None = None
    step_ids: deque[int] = field(default_factory=deque[int])
    running_since_s: float | None = None

    def sent(self, step_id: int, now_s: float) -> None:
        self.step_ids.append(step_id)
        if len(self.step_ids) == 1:
            self.running_since_s = now_s

    def answered(self, worker_id: str, step_id: int, now_s: float) -> bool:
        """Takes the oldest step off. False if the reply is not from whom and what is expected."""
        if worker_id != self.worker_id or not self.step_ids or self.step_ids[0] != step_id:
            return False
        self.step_ids.popleft()
        self.running_since_s = now_s if self.step_ids else None
        return True

    def lose(self) -> list[int]:
        """The worker is gone: returns the steps it had."""
        lost = list(self.step_ids)
        self.worker_id = None
        self.step_ids.clear()
        self.running_since_s = None
        return lost

"""What the requests of one client may ask for, and how long they may take."""

from dataclasses import dataclass

from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import MAX_PRIORITY


@dataclass(frozen=True, slots=True)
class Bounds:
    """
    Attributes:
      min_priority: the most important one.
      timeout_s: of a request, from its submission to its end; None is for ever.
    """

    min_priority: int = -MAX_PRIORITY
    timeout_s: float | None = None

    def check_priority(self, priority: int) -> None:
        """Raises InvalidRequestError if it is more important than allowed."""
        if priority < self.min_priority:
            raise InvalidRequestError(
                f"priority is {priority}; allowed: {self.min_priority} and above", field="priority"
            )

"""What clients are told: the results of one reply, one message per client."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from semipd_jax.messages import Done, Outputs
from semipd_jax.request import TokenLogprob
from semipd_jax.scheduler.scheduler import Ending, Result


@dataclass(slots=True)
class _Batch:
    handles: list[int] = field(default_factory=list[int])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list[tuple[int, TokenLogprob]])
    done: list[Done] = field(default_factory=list[Done])


def outputs(result: Result) -> list[tuple[str, Outputs]]:
    """(client, message) for every client that the result concerns."""
    batches: defaultdict[str, _Batch] = defaultdict(_Batch)
    for token in result.tokens:
        batch = batches[token.request.client]
        if token.logprob is not None:
            batch.logprobs.append((len(batch.handles), token.logprob))
        batch.handles.append(token.request.handle)
        batch.token_ids.append(token.token_id)
    for ending in result.endings:
        batches[ending.request.client].done.append(_done(ending))
    return [(client, _message(batch)) for client, batch in batches.items()]


def _message(batch: _Batch) -> Outputs:
    return Outputs(
        handles=np.array(batch.handles, np.int64).tobytes(),
        token_ids=np.array(batch.token_ids, np.int32).tobytes(),
        logprobs=batch.logprobs,
        done=batch.done,
    )


def _done(ending: Ending) -> Done:
    return Done(
        handle=ending.request.handle,
        reason=ending.reason,
        timings=ending.timings,
        completion_tokens=ending.request.num_output,
        stop_token_id=ending.stop_token_id,
        error=ending.error,
    )

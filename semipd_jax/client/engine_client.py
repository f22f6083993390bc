"""The link between one event loop and the coordinator, shared by all requests of this process."""

import asyncio
import contextlib
import itertools
import logging
import math
import random
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Self, cast

import numpy as np

from semipd_jax.client.bounds import Bounds
from semipd_jax.client.line import CALLER
from semipd_jax.client.observations import ERROR, Observations, RequestTimes
from semipd_jax.client.prompt import Prompt, PromptEncoder
from semipd_jax.client.sampling import (
    CheckedSampling,
    check_sampling,
    fold_seed,
    load_generation_defaults,
)
from semipd_jax.client.stream import Stream
from semipd_jax.client.turns import Turns
from semipd_jax.config import POLICIES, ModelConfig, SharePolicy
from semipd_jax.errors import (
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    RequestNotFoundError,
    RequestTimeoutError,
    UnavailableError,
)
from semipd_jax.messages import (
    Abort,
    Admitted,
    FromCoordinator,
    GetStats,
    MemoryLayout,
    Outputs,
    Partition,
    PartitionReply,
    Refused,
    SetPartition,
    SetSlo,
    Slo,
    Stats,
    Submit,
    ToCoordinator,
)
from semipd_jax.request import (
    MAX_REQUEST_ID_CHARS,
    Event,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    validate_scheduling,
)
from semipd_jax.text.output import OutputText
from semipd_jax.text.tokenizer import Tokenizer, load_tokenizer
from semipd_jax.transport.channels import CLIENTS, AsyncLink

_STATS_TIMEOUT_S: Final = 10.0
_RETRY_S: Final = 0.1

_log = logging.getLogger(__name__)


class EngineClient:
    """Submits requests and streams what comes back. Belongs to the event loop it was started on.

    Args:
      run_dir: private directory that holds the coordinator's socket.
      layout: sizes of the running engine.
      model: its seed starts the seeds of requests that bring none.
      generation_defaults: the model's, by `load_generation_defaults`.
      bounds: of every request.

    Attributes:
      tokenizer: the model's.
      layout, model, generation_defaults: as given.
      observations: of every request since the client was made.
      failed: set when the link itself failed; every request has ended then.
    """

    def __init__(
        self,
        run_dir: str,
        layout: MemoryLayout,
        tokenizer: Tokenizer,
        model: ModelConfig,
        generation_defaults: Mapping[str, Any],
        bounds: Bounds | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._bounds = bounds or Bounds()
        self.layout = layout
        self.model = model
        self.tokenizer = tokenizer
        self.observations = Observations(layout.max_model_len)
        self.generation_defaults = generation_defaults
        self._seeds = random.Random(model.seed)
        self._prompts = PromptEncoder(tokenizer, layout.max_model_len)
        self._numbers = itertools.count(1)  # of requests and queries on the link
        self._streams: dict[int, Stream] = {}
        self._turns = Turns()
        self._handles: dict[tuple[str, ...], int] = {}  # by `_name`
        self._queries: dict[int, asyncio.Future[Any]] = {}
        self._link: AsyncLink[FromCoordinator, ToCoordinator] | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._lost: EngineError | None = None
        self.failed = asyncio.Event()

    @classmethod
    async def connect(cls, run_dir: str, layout: MemoryLayout, model: ModelConfig) -> Self:
        """A started client with the model's tokenizer and defaults."""
        tokenizer = await asyncio.to_thread(load_tokenizer, model.tokenizer_path)
        client = cls(run_dir, layout, tokenizer, model, load_generation_defaults(model.path))
        await client.start()
        return client

    async def start(self) -> None:
        identity = f"client-{uuid.uuid4().hex}"
        self._link = AsyncLink(self._run_dir, CLIENTS, identity, FromCoordinator)
        self._receiver = asyncio.create_task(self._receive(self._link), name="engine client")

    async def close(self) -> None:
        """Ends every request of this client. Safe to call twice."""
        for handle in self._streams:
            self._abort(handle, FinishReason.ABORT)
        self.connection_lost(UnavailableError("the engine client was closed"))
        self._prompts.close()
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiver
            self._receiver = None
        if self._link is not None:
            self._link.close()
            self._link = None

    def connection_lost(self, error: EngineError) -> None:
        """The coordinator is gone: ends every request, and refuses new ones, for this reason."""
        self._lost = error
        for stream in self._streams.values():
            stream.fail(str(error))
            self.observations.gave_up(ERROR)
        self._streams.clear()
        self._handles.clear()
        for query in self._queries.values():
            if not query.done():
                query.set_exception(UnavailableError(str(error)))
        self._queries.clear()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | Mapping[str, Any],
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[Event]:
        """Streams Started, Deltas, Finished. Closing the generator ends the request at once.

        Args:
          prompt: text, token ids, or chat messages.
          sampling: all of it, or a mapping of the fields that differ from the model's defaults.
          request_id: chosen here when absent.
          priority, cache_salt: see `request.Request`.

        Raises:
          InvalidRequestError, DuplicateRequestError, OverloadedError, UnavailableError,
          RequestFailedError, RequestTimeoutError.
        """
        times = RequestTimes(self.observations.clock())
        with self._counting_refusals():
            self._connected()
            _check_request_id(request_id or "")
            checked = self._check(sampling, priority, cache_salt)
            token_ids = await self._prompts.encode(prompt)
            request = self._request(token_ids, checked, priority, cache_salt)
            stream = self._submit(request, request_id or uuid.uuid4().hex, times)
        async with contextlib.aclosing(self._events(stream)) as events:
            async for event in events:
                yield event

    async def prepare(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams | Mapping[str, Any],
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Request]:
        """One request for each prompt, to be run any number of times. The sampling is checked once,
        and each prompt once.

        Args:
          prompts: as `encode` returns them.
          sampling, priority, cache_salt: as for `generate`.

        Raises:
          InvalidRequestError, UnavailableError.
        """
        with self._counting_refusals():
            self._connected()
            checked = self._check(sampling, priority, cache_salt)
            requests: list[Request] = []
            for token_ids in prompts:
                requests.append(self._request(token_ids, checked, priority, cache_salt))
                await asyncio.sleep(0)  # each alone is quick
        return requests

    async def run(
        self, request: Request, request_id: str, seed: int | None = None
    ) -> AsyncGenerator[Event]:
        """Streams what `generate` would.

        Args:
          request: by `prepare`.
          seed: chosen here when None.

        Raises:
          What `generate` does.
        """
        times = RequestTimes(self.observations.clock())
        request = replace(request, sampling=replace(request.sampling, seed=seed))
        with self._counting_refusals():
            _check_request_id(request_id)
            stream = self._submit(request, request_id, times)
        async with contextlib.aclosing(self._events(stream)) as events:
            async for event in events:
                yield event

    async def abort(self, request_id: str) -> None:
        """Ends a request of the caller's key; its stream ends with reason ABORT.

        Raises:
          RequestNotFoundError: no running request of that key has this id.
        """
        handle = self._handles.get(_name(CALLER.get(), request_id))
        if handle is None:
            raise RequestNotFoundError(f"no running request has id {request_id!r:.200}")
        self._abort(handle, FinishReason.ABORT)

    async def stats(self, *, timeout_s: float = _STATS_TIMEOUT_S) -> Stats:
        """Raises UnavailableError if the coordinator does not answer in time."""
        return await self._ask(GetStats, timeout_s)

    async def partition(self) -> Partition:
        """How compute is divided, by whom, and for what."""
        return await self.set_partition()

    async def set_partition(
        self,
        *,
        prefill: float | None = None,
        decode: float | None = None,
        policy: SharePolicy | None = None,
    ) -> Partition:
        """The partition after a change of what is given. A share makes the policy "static" until a
        policy is set again.

        A share on the ladder holds from the phase's next step on. Another one does so once a worker
        is ready; until then the phase runs at the closest share that has one.

        Raises:
          InvalidRequestError: a share is not above 0 and at most 1, or the policy cannot work with
            the engine's options.
        """
        for name, share in (("prefill", prefill), ("decode", decode)):
            allowed = share is None or 0.0 < share <= 1.0
            _check(allowed, f"{name}_share", share, "above 0 and at most 1")
        has_shares = (prefill, decode) != (None, None)
        names = ("static",) if has_shares else POLICIES
        _check(policy is None or policy in names, "policy", policy, ", ".join(names))
        return await self._change("policy", lambda i: SetPartition(i, prefill, decode, policy))

    async def set_slo(
        self,
        *,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        priority: int | None = None,
        target: float | None = None,
        remove: bool = False,
    ) -> Partition:
        """The partition, after a promise took the place of the one before: to requests of a
        priority, or (None) to those whose priority has no promise of its own.

        Args:
          ttft_ms, tpot_ms: None promises nothing.
          target: the share of requests that should meet both; None leaves it as it is.
          remove: takes the priority's own promise away: what the others are promised holds for it
            again.

        Raises:
          InvalidRequestError: a value is out of range, or the policy cannot work without it.
        """
        for name, ms in (("ttft_ms", ttft_ms), ("tpot_ms", tpot_ms)):
            _check(ms is None or 0 < ms < math.inf, name, ms, "a positive number")
        _check(target is None or 0 < target < 1, "target", target, "between 0 and 1")
        names_one = priority is not None and ttft_ms is None and tpot_ms is None
        _check(names_one or not remove, "remove", remove, "only with a priority and no promise")
        slo = Slo(ttft_ms, tpot_ms, priority)
        return await self._change("slo", lambda i: SetSlo(i, slo, target, remove))

    async def _change(
        self, field: str, query_of: Callable[[int], SetPartition | SetSlo]
    ) -> Partition:
        reply: PartitionReply = await self._ask(query_of, _STATS_TIMEOUT_S)
        if reply.error is not None:
            raise InvalidRequestError(reply.error, field=field)
        return reply.partition

    async def _ask(
        self, query_of: Callable[[int], GetStats | SetPartition | SetSlo], timeout_s: float
    ) -> Any:
        """The coordinator's answer to a query, made from its number."""
        link = self._connected()
        query_id = next(self._numbers)
        query = self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            link.send(query_of(query_id))
            return await asyncio.wait_for(query, timeout_s)
        except (TimeoutError, BlockingIOError) as error:
            raise UnavailableError("the coordinator does not answer") from error
        finally:
            self._queries.pop(query_id, None)

    async def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids as `generate` would see them."""
        return await self._prompts.encode(prompt, add_special_tokens=add_special_tokens)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return await self._prompts.decode(token_ids, skip_special_tokens=skip_special_tokens)

    # ------------------------------------------------------------ requests

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            self.observations.refusal(error)
            raise

    async def _events(self, stream: Stream) -> AsyncGenerator[Event]:
        """Until the end of the request; whoever leaves before ends it."""
        reason = FinishReason.ABORT.value
        timer = self._limit(stream)
        try:
            while True:
                event = await stream.next()
                yield event
                if isinstance(event, Finished):
                    return
        except RequestFailedError:
            reason = ERROR
            raise
        finally:
            if timer is not None:
                timer.cancel()
            stream.close()
            if self._forget(stream):
                self._abort(stream.handle, FinishReason.ABORT)
                self.observations.gave_up(reason)

    def _check(
        self, sampling: SamplingParams | Mapping[str, Any], priority: object, cache_salt: object
    ) -> CheckedSampling:
        validate_scheduling(priority=priority, cache_salt=cache_salt)
        self._bounds.check_priority(cast(int, priority))
        vocab_size = self.layout.vocab_size
        return check_sampling(sampling, self.generation_defaults, vocab_size=vocab_size)

    def _request(
        self, token_ids: tuple[int, ...], checked: CheckedSampling, priority: int, cache_salt: str
    ) -> Request:
        """Without an id."""
        layout = self.layout
        params = checked.after(
            token_ids, vocab_size=layout.vocab_size, max_model_len=layout.max_model_len
        )
        eos = () if params.ignore_eos else layout.eos_token_ids
        stops = tuple(dict.fromkeys(params.stop_token_ids + eos))
        return Request(
            request_id="",
            prompt_token_ids=token_ids,
            sampling=replace(params, stop_token_ids=stops),
            priority=priority,
            cache_salt=cache_salt,
        )

    def _submit(self, request: Request, request_id: str, times: RequestTimes) -> Stream:
        token_ids, caller = request.prompt_token_ids, CALLER.get()
        name = _name(caller, request_id)
        if name in self._handles:
            raise DuplicateRequestError(f"a request with id {request_id!r} is running")
        link = self._connected()
        handle = next(self._numbers)
        seed = request.sampling.seed
        seed = self._seeds.getrandbits(32) if seed is None else fold_seed(seed)
        sampling = replace(request.sampling, seed=seed)
        request = replace(request, request_id=request_id, sampling=sampling)
        text = OutputText(self.tokenizer, token_ids, request.sampling)
        try:
            link.send(Submit(handle, request))
        except BlockingIOError as error:
            raise OverloadedError(str(error)) from error
        stream = Stream(handle, request_id, len(token_ids), text, times, self._turns, caller)
        self._streams[handle] = stream
        self._handles[name] = handle
        return stream

    def _limit(self, stream: Stream) -> asyncio.TimerHandle | None:
        """Ends the request in time."""
        timeout_s = self._bounds.timeout_s
        if timeout_s is None:
            return None

        def end() -> None:
            if self._forget(stream):
                text = f"the request took longer than {timeout_s:g} s, the most that is allowed"
                stream.refused(RequestTimeoutError(text))
                self._abort(stream.handle, FinishReason.ABORT, text)
                self.observations.gave_up(ERROR)

        return asyncio.get_running_loop().call_later(timeout_s, end)

    def _connected(self) -> AsyncLink[FromCoordinator, ToCoordinator]:
        if self._lost is not None:
            raise UnavailableError(str(self._lost))
        if self._link is None:
            raise UnavailableError("the engine client was not started")
        return self._link

    def _forget(self, stream: Stream) -> bool:
        """Whether the request was still running."""
        if self._streams.pop(stream.handle, None) is None:
            return False
        del self._handles[_name(stream.caller, stream.request_id)]
        return True

    def _abort(self, handle: int, reason: FinishReason, error: str | None = None) -> None:
        if self._link is None:
            return
        try:
            self._link.send(Abort(handle, reason, error))
        except BlockingIOError:
            asyncio.get_running_loop().call_later(_RETRY_S, self._abort, handle, reason, error)

    # ------------------------------------------------------------ what the coordinator says

    async def _receive(self, link: AsyncLink[FromCoordinator, ToCoordinator]) -> None:
        try:
            while True:
                self._take(await link.receive())
        except Exception:
            _log.exception("the link to the coordinator failed")
            self.connection_lost(UnavailableError("the link to the coordinator failed"))
            self.failed.set()

    def _take(self, message: FromCoordinator) -> None:
        match message:
            case Outputs():
                self._take_outputs(message)
            case Admitted(handle=handle):
                if stream := self._streams.get(handle):
                    stream.admitted(message)
                    self.observations.admitted(stream.prompt_len)
            case Refused(handle=handle, message=text, field=field):
                if stream := self._streams.get(handle):
                    self._forget(stream)
                    error = (
                        InvalidRequestError(text, field=field) if field else OverloadedError(text)
                    )
                    stream.refused(error)
                    self.observations.refusal(error)
            case Stats(query_id=query_id) | PartitionReply(query_id=query_id):
                query = self._queries.pop(query_id, None)
                if query is not None and not query.done():
                    query.set_result(message)

    def _take_outputs(self, message: Outputs) -> None:
        handles = np.frombuffer(message.handles, np.int64).tolist()
        token_ids = np.frombuffer(message.token_ids, np.int32).tolist()
        logprobs = dict(message.logprobs)
        now_s = self.observations.clock()
        for i, (handle, token_id) in enumerate(zip(handles, token_ids, strict=True)):
            stream = self._streams.get(handle)
            if stream is None or stream.is_stopped:
                continue
            self.observations.token(stream.times, now_s)
            if stream.token(token_id, logprobs.get(i)):
                self._abort(handle, FinishReason.STOP)
        for done in message.done:
            if stream := self._streams.get(done.handle):
                self._forget(stream)
                stream.done(done)
                if stream.has_failed:
                    self.observations.gave_up(ERROR)
                else:
                    reason = done.reason
                    self.observations.ended(stream.times, stream.prompt_len, reason, done.timings)


def _name(caller: tuple[str, ...], request_id: str) -> tuple[str, ...]:
    """Of a request, by which nobody finds those of another key."""
    return (*caller[:1], request_id)


def _check(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{field} is {value!r:.100}; allowed: {allowed}", field=field)


def _check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID_CHARS or not (
        request_id.isascii() and request_id.isprintable()
    ):
        raise InvalidRequestError(
            f"request_id is {request_id!r:.200}; allowed: at most {MAX_REQUEST_ID_CHARS} printable "
            "ASCII characters",
            field="request_id",
        )

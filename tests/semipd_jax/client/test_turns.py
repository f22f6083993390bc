import asyncio
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.client import turns as turns_module
from semipd_jax.client.turns import MAX_TURNS, Turns


@dataclass(eq=False)
class Named:
    caller: tuple[str, ...]
    tell: Callable[["Named"], None]

    def begin(self) -> None:
        self.tell(self)


def served(callers: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """In which order those who ask while all turns are taken get theirs."""

    async def main() -> list[tuple[str, ...]]:
        order: list[Named] = []
        turns = Turns()
        for _ in range(MAX_TURNS):
            turns.ask(Named((), order.append))
        for caller in callers:
            turns.ask(Named(caller, order.append))
        assert len(order) == MAX_TURNS
        for i in range(len(callers)):
            turns.over(order[i])
        return [waiter.caller for waiter in order[MAX_TURNS:]]

    return asyncio.run(main())


def test_who_is_alone_waits_for_one_of_the_many():
    many, alone = ("key", "host", "1"), ("key", "host", "2")
    assert served([*[many] * 100, alone])[:3] == [many, alone, many]


def test_a_second_connection_or_host_brings_its_holder_no_more_turns():
    greedy = [("greedy", host, str(i)) for i in range(20) for host in ("a", "b")]
    order = served([*greedy, *[("modest", "c", "0")] * 3])
    assert [i for i, caller in enumerate(order) if caller[0] == "modest"] == [1, 3, 5]


def test_those_who_leave_the_line_are_forgotten():
    async def main() -> None:
        turns = Turns()
        for _ in range(MAX_TURNS):
            turns.ask(Named((), lambda _: None))
        leaver = Named(("key",), lambda _: None)
        left = weakref.ref(leaver)
        turns.ask(leaver)
        turns.over(leaver)
        del leaver
        assert left() is None

    asyncio.run(main())


@given(st.lists(st.tuples(*(st.sampled_from("ab"),) * 3), max_size=40))
def test_all_are_served_and_no_caller_gets_further_ahead_than_one_turn(
    callers: list[tuple[str, ...]],
):
    order = served(callers)
    assert sorted(order) == sorted(callers)
    left = {name: sum(c[0] == name for c in callers) for name in "ab"}
    ahead = 0
    for caller in order:
        ahead += 1 if caller[0] == "a" else -1
        assert abs(ahead) <= 1
        left[caller[0]] -= 1
        if not all(left.values()):
            break


def test_who_leaves_the_line_is_passed_over():
    async def main():
        order: list[Named] = []
        turns = Turns()
        waiters = [Named((), order.append) for _ in range(MAX_TURNS + 3)]
        for waiter in waiters:
            turns.ask(waiter)
        turns.over(waiters[-2])
        turns.over(waiters[0])
        turns.over(waiters[1])
        assert order[MAX_TURNS:] == [waiters[-3], waiters[-1]]

    asyncio.run(main())


def test_a_turn_that_does_not_end_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns_module, "MAX_TURN_S", 0.01)

    async def main():
        turns, last = Turns(), asyncio.Event()
        for _ in range(3 * MAX_TURNS):
            turns.ask(Named((), lambda _: None))
        turns.ask(Named((), lambda _: last.set()))
        async with asyncio.timeout(60):
            await last.wait()

    asyncio.run(main())

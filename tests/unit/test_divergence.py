"""Who is to blame follows from who sent what: the one that had received nothing else yet."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from parallelism.recorder import Sent, fold
from parallelism.replicas import Disagreement, _factor, judge_replicas
from trainer.divergence import Divergence, disputed, divergence, is_excused, outvoted

RANKS = 4


def simulate(program: Sequence[tuple[int, ...]], guilty: int = -1, at: int = -1) -> list[tuple[Sent, ...]]:
    """Tapes of ranks that compute: each entry of the program is a group whose ranks exchange what they have.

    Before exchange number `at`, a bit flips in what the guilty rank has.
    """
    has = [fold([rank + 1]) for rank in range(RANKS)]
    tapes: list[list[Sent]] = [[] for _ in range(RANKS)]
    numbers: dict[tuple[int, ...], int] = {}
    for place, group in enumerate(program):
        if place == at:
            has[guilty] ^= 1 << 7
        number = numbers.get(group, 0)
        numbers[group] = number + 1
        for rank in group:
            tapes[rank].append(Sent(hash(group), number, has[rank]))
        mixed = fold([has[rank] for rank in group])
        for rank in group:
            has[rank] = fold([has[rank], mixed])
    return [tuple(tape) for tape in tapes]


def guilty_of(first: list[tuple[Sent, ...]], again: list[tuple[Sent, ...]]) -> set[int]:
    """The ranks that differ and have no excuse."""
    found = {rank: difference for rank in range(RANKS) if (difference := divergence(first[rank], again[rank]))}
    return {
        rank for rank, mine in found.items()
        if not is_excused(first[rank], mine, [each.sends for other, each in found.items() if other != rank])
    }  # fmt: skip


GROUPS = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3), (1, 2)]


@given(st.lists(st.sampled_from(GROUPS), min_size=1, max_size=30), st.integers(0, RANKS - 1), st.data())
def test_the_rank_whose_numbers_changed_is_named_whoever_they_reach(
    program: list[tuple[int, ...]], guilty: int, data: st.DataObject
) -> None:
    """In any order of collectives over any groups, whichever computation it struck: that rank, and no other."""
    at = data.draw(st.integers(0, len(program) - 1))
    clean, bent = simulate(program), simulate(program, guilty, at)
    sends_later = any(guilty in group for group in program[at:])
    assert guilty_of(clean, bent) == ({guilty} if sends_later else set())
    assert guilty_of(bent, clean) == ({guilty} if sends_later else set())
    assert guilty_of(clean, clean) == set()


def test_a_receiver_is_excused_and_a_shorter_tape_differs() -> None:
    """A send from one rank to another excuses the other; what is missing is a difference."""
    receipt, after = Sent(1, 0, None), Sent(2, 0, 5)
    first, again = (receipt, after), (receipt, Sent(2, 0, 6))
    mine = divergence(first, again)
    assert mine == Divergence(1, {2: 0})
    assert is_excused(first, mine, [{1: 0}])
    assert not is_excused(first, mine, [{3: 0}])
    assert divergence(first, first[:1]) is not None
    assert divergence(first, first) is None


@given(st.integers(3, 9), st.integers(0, 8), st.integers(1, 2**63))
def test_a_majority_names_the_odd_replica(count: int, odd: int, value: int) -> None:
    """Of three or more replicas the one that differs is named; of two nobody knows which."""
    odd %= count
    held = {1: dict.fromkeys(range(count), 0) | {odd: value}, 2: {0: 5, 1: 5}}
    assert judge_replicas(held) == Disagreement(frozenset({odd}), frozenset())
    assert judge_replicas({1: {0: 1, 1: value + 1}}) == Disagreement(frozenset(), frozenset({0, 1}))


@given(st.integers(2, 40), st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**64 - 1), st.data())
def test_equal_replicas_add_up_to_nothing_and_one_that_differs_does_not(
    count: int, value: int, change: int, data: st.DataObject
) -> None:
    """The sum over all ranks is zero if they agree, whatever they hold."""
    factors = [_factor(99, place, count) for place in range(count)]
    assert sum(factor * value for factor in factors) % 2**64 == 0
    odd = data.draw(st.integers(0, count - 1))
    flipped = 1 << data.draw(st.integers(0, 31))
    assert (factors[odd] * (flipped | change << 32)) % 2**64 != 0


def test_a_device_that_is_always_wrong_is_outvoted() -> None:
    """Three devices computed each share: the odd one out is the same in every share that it computed."""
    right = {share: random.Random(share).getrandbits(60) for share in range(4)}
    shares = {share: {(share - distance) % 4: right[share] for distance in range(3)} for share in range(4)}
    assert outvoted(shares) == frozenset()
    for by_rank in shares.values():
        if 2 in by_rank:
            by_rank[2] += 1
    assert outvoted(shares) == {2}
    two = {0: {0: right[0], 3: right[0]}, 1: {1: 1, 0: 2}}
    assert outvoted(two) == frozenset()
    assert disputed(two) == {0, 1}

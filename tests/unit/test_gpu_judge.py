"""Readings and XIDs of GPUs become verdicts: the bad GPU is accused once and in time, a healthy one never."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from health.gpu import GpuJudge
from health.gpu_facts import Carrier, GpuSample, XidEvent
from health.gpu_signals import GpuLimits, Rise
from health.verdict import Cause, Certainty, Severity, Verdict
from health.xid import Recovery, XidAction, action_of, known_xids

CARRIER = Carrier(rank=5, step=40, generation=2)
LIMITS = GpuLimits(throttle_samples=4)
HEALTHY = GpuSample(
    t_s=0.0, index=3, uuid="GPU-1", temperature_c=60, power_w=650.0, sm_clock_mhz=1980, reasons=0, corrected=7,
    corrected_ever=90, uncorrected=1, uncorrected_ever=2, rows_correctable=1, rows_uncorrectable=1, remap_pending=False,
    remap_failed=False, links=(True,) * 18, link_errors=3, pcie_replays=11, pcie_width=16, pcie_width_max=16,
    pcie_gen=5, pcie_gen_max=5, utilization_pct=98, recovery=0,
)  # fmt: skip
"""A GPU that has had its errors in the past, long before this run."""


def watch(*changes: dict[str, object], interval_s: float = 5.0) -> list[list[Verdict]]:
    """Verdicts after each reading of one GPU: a healthy one first, then one for each set of changes."""
    judge = GpuJudge("node1", LIMITS)
    samples = [HEALTHY, *(msgspec.structs.replace(HEALTHY, **each) for each in changes)]  # type: ignore[arg-type]
    return [
        judge.sample(msgspec.structs.replace(sample, t_s=number * interval_s), CARRIER)
        for number, sample in enumerate(samples)
    ]


def heard(*xids: tuple[int, int], recovery: int | None = None) -> list[list[Verdict]]:
    """Verdicts after each XID of one GPU, given as number and generation."""
    judge = GpuJudge("node1", LIMITS)
    return [
        judge.xid(XidEvent(t_s=60.0 * i, index=3, xid=xid, recovery=recovery), Carrier(5, 40, generation))
        for i, (xid, generation) in enumerate(xids)
    ]


STATES = [
    ({"lost": "GPU is lost"}, "gpu lost", Cause.GPU_FAULT, Certainty.PROOF, 1),
    ({"recovery": 1}, "gpu recovery gpu_reset", Cause.GPU_FAULT, Certainty.PROOF, 1),
    ({"recovery": 2}, "gpu recovery node_reboot", Cause.GPU_FAULT, Certainty.PROOF, 1),
    ({"recovery": 3}, "gpu recovery drain_p2p", Cause.GPU_FAULT, Certainty.PROOF, 1),
    ({"recovery": 4}, "gpu recovery drain_and_reset", Cause.GPU_FAULT, Certainty.LIKELY, 1),
    ({"uncorrected": 2}, "ecc uncorrected", Cause.GPU_FAULT, Certainty.LIKELY, 1),
    ({"uncorrected_ever": 3}, "ecc uncorrected", Cause.GPU_FAULT, Certainty.LIKELY, 1),
    ({"remap_failed": True}, "remap failed", Cause.GPU_FAULT, Certainty.PROOF, 1),
    ({"remap_pending": True}, "remap pending", Cause.GPU_DEGRADED, Certainty.HINT, 1),
    ({"remap_pending": True, "rows_uncorrectable": 2}, "remap pending", Cause.GPU_DEGRADED, Certainty.LIKELY, 1),
    ({"links": (True,) * 17 + (False,)}, "nvlink down", Cause.GPU_FAULT, Certainty.LIKELY, 2),
    ({"link_errors": 1500}, "nvlink errors", Cause.GPU_DEGRADED, Certainty.HINT, 1),
    ({"link_errors": 5000}, "nvlink errors", Cause.GPU_DEGRADED, Certainty.LIKELY, 1),
    ({"pcie_replays": 40}, "pcie replays", Cause.GPU_DEGRADED, Certainty.HINT, 1),
    ({"pcie_replays": 400}, "pcie replays", Cause.GPU_DEGRADED, Certainty.LIKELY, 1),
    ({"pcie_width": 8}, "pcie width", Cause.GPU_DEGRADED, Certainty.LIKELY, 2),
    ({"pcie_gen": 1}, "pcie generation", Cause.GPU_DEGRADED, Certainty.HINT, 4),
    ({"reasons": 0x20}, "throttled", Cause.GPU_DEGRADED, Certainty.HINT, 4),
    ({"reasons": 0x40 | 0x08 | 0x04}, "throttled", Cause.GPU_DEGRADED, Certainty.HINT, 4),
    ({"reasons": 0x80}, "throttled", Cause.GPU_DEGRADED, Certainty.HINT, 4),
    ({"corrected_ever": 2000}, "ecc corrected", Cause.GPU_DEGRADED, Certainty.HINT, 1),
    ({"unreadable": "Unknown Error"}, "unreadable", Cause.GPU_DEGRADED, Certainty.HINT, 4),
]


@pytest.mark.parametrize(("change", "name", "cause", "certainty", "after"), STATES)
def test_every_signal_is_noticed_in_time_and_said_once(
    change: dict[str, object], name: str, cause: Cause, certainty: Certainty, after: int
) -> None:
    """Promise: each signal becomes one verdict, after the stated number of readings and with the stated weight."""
    said = watch(*[change] * (after + 2))
    assert [len(each) for each in said] == [0] * after + [1, 0, 0]
    (verdict,) = said[after]
    assert (verdict.fingerprint, verdict.cause, verdict.certainty) == (name, cause, certainty)
    assert (verdict.severity, verdict.node, verdict.device) == (Severity.NODE, "node1", "gpu3")
    assert (verdict.rank, verdict.step) == (5, 40)
    assert verdict.evidence[0].startswith("gpu3 of node1: ")


def test_what_goes_on_grows_surer_and_what_comes_back_is_said_again() -> None:
    """Promise: throttling is a hint first and likely after four times as long; once over, it begins anew."""
    hot = {"reasons": 0x40}
    said = watch(*[hot] * 17, {}, *[hot] * 4)
    found = [(number, each.certainty) for number, verdicts in enumerate(said) for each in verdicts]
    assert found == [(4, Certainty.HINT), (16, Certainty.LIKELY), (22, Certainty.HINT)]


noise = st.fixed_dictionaries({
    "temperature_c": st.integers(20, 90),
    "power_w": st.floats(50, 750),
    "sm_clock_mhz": st.integers(300, 2000),
    "utilization_pct": st.integers(0, 100),
    "reasons": st.sampled_from([0, 0x1, 0x2, 0x4, 0x5, 0x10, 0x100]),
    "pcie_gen": st.just(5),
    "corrected": st.integers(7, 60),
    "pcie_replays": st.integers(11, 14),
    "link_errors": st.integers(3, 30),
})  # fmt: skip


@given(st.lists(noise, min_size=1, max_size=60))
def test_a_healthy_gpu_is_never_accused(changes: list[dict[str, object]]) -> None:
    """Promise: heat, power caps, idleness, old errors and a few corrected ones make no verdict."""
    counters = ("corrected", "pcie_replays", "link_errors")
    rising = {key: sorted(int(str(each[key])) for each in changes) for key in counters}
    steady = [{**each, **{key: rising[key][i] for key in counters}} for i, each in enumerate(changes)]
    assert watch(*steady) == [[]] * (len(changes) + 1)


@given(st.lists(st.booleans(), max_size=40))
def test_throttling_shorter_than_the_bound_is_nothing(hot: list[bool]) -> None:
    """Promise: there is a verdict exactly where a row of hot readings reaches the bound, and one level higher at four
    times the bound."""
    said = watch(*({"reasons": 0x40 if each else 0} for each in hot))
    row = 0
    for each, verdicts in zip(hot, said[1:], strict=True):
        row = row + 1 if each else 0
        assert len(verdicts) == (row in (LIMITS.throttle_samples, 4 * LIMITS.throttle_samples))


@given(st.lists(st.integers(0, 3), max_size=30))
def test_uncorrected_errors_count_from_the_reading_before(growth: list[int]) -> None:
    """Promise: a rise is accused in the reading that shows it; an old count, and one that stands still, never is."""
    values = [1 + sum(growth[: i + 1]) for i in range(len(growth))]
    said = watch(*({"uncorrected": value} for value in values))
    assert said[0] == []
    for i, verdicts in enumerate(said[1:]):
        first_of_a_row = growth[i] > 0 and (i == 0 or growth[i - 1] == 0)
        assert [each.fingerprint for each in verdicts] == ["ecc uncorrected"] * first_of_a_row


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), max_size=40), st.floats(1, 100))
def test_a_rate_is_what_grew_within_the_window(steps: list[tuple[float, int]], window_s: float) -> None:
    """Promise: growth is counted within the window, and a counter that falls was reset."""
    rise, now_s, last, grown = Rise(window_s), 0.0, None, []
    for pause_s, value in steps:
        now_s += pause_s
        if last is not None and value > last:
            grown.append((now_s, value - last))
        last = value
        assert rise.feed(now_s, value) == sum(by for at, by in grown if at >= now_s - window_s)


@pytest.mark.parametrize(("change", "name"), [
    ({"uncorrected": 4, "uncorrected_ever": 5}, "ecc uncorrected"),
    ({"links": (True,) * 17 + (False,)}, "nvlink down"),
    ({"pcie_width": 4}, "pcie width"),
    ({"remap_pending": True, "rows_uncorrectable": 2}, "remap pending"),
])  # fmt: skip
def test_what_cannot_be_read_now_and_then_is_compared_all_the_same(change: dict[str, object], name: str) -> None:
    """Promise: a value that the driver failed to give is no fresh start, be it in the first reading or a later one."""
    blind = msgspec.structs.replace(
        HEALTHY, unreadable="ECC: unknown error", links=None, pcie_width=None, uncorrected=None, uncorrected_ever=None,
        rows_uncorrectable=None,
    )  # fmt: skip
    bad = msgspec.structs.replace(HEALTHY, **change)  # type: ignore[arg-type]
    for readings in ((blind, HEALTHY, bad, bad), (HEALTHY, blind, bad, bad)):
        judge = GpuJudge("node1", LIMITS)
        samples = (msgspec.structs.replace(each, t_s=5.0 * number) for number, each in enumerate(readings))
        found = [verdict.fingerprint for each in samples for verdict in judge.sample(each, CARRIER)]
        assert found == [name]


def test_a_lost_gpu_has_no_other_news() -> None:
    """Promise: what cannot be read of a lost GPU is not mended, and the loss is said once."""
    said = watch({"remap_failed": True}, {"lost": "GPU is lost"}, {"lost": "GPU is lost"}, {"remap_failed": True})
    assert [[each.fingerprint for each in verdicts] for verdicts in said] == [
        [], ["remap failed"], ["gpu lost"], [], [],
    ]  # fmt: skip


GROUPS = {
    XidAction.EVICT: "79 151",
    XidAction.RESET: "46 62 64 95 109 110 119 120 136 140 143 155 156 158",
    XidAction.WORKFLOW: "48 54 74 144 145 146 147 148 149 150",
    XidAction.RESTART: (
        "8 11 13 25 31 32 39 40 41 60 68 69 70 71 72 75 76 77 80 82 83 84 85 86 88 89 94 96 97 98 99 100 101 102 103 "
        "104 105 126 127 128 129 130 131 132 133 134 135 139"
    ),
    XidAction.LOG: "14 37 38 43 44 63 66 67 92 93 106 107 108 121 137 141 152 153 157 160 161",
    XidAction.OPERATOR: "78 159 162 163 164 165 166 167 168 169 170 171 172",
    XidAction.COMPANION: "45",
    XidAction.NAMED: "154",
}
WEIGHT = {
    XidAction.EVICT: (Cause.GPU_FAULT, Severity.NODE, Certainty.PROOF),
    XidAction.RESET: (Cause.GPU_FAULT, Severity.NODE, Certainty.LIKELY),
    XidAction.WORKFLOW: (Cause.GPU_FAULT, Severity.NODE, Certainty.LIKELY),
    XidAction.RESTART: (Cause.CUDA_ERROR, Severity.WORKERS, Certainty.LIKELY),
    XidAction.OPERATOR: (Cause.GPU_FAULT, Severity.NOTICE, Certainty.LIKELY),
}


def test_the_table_is_whole() -> None:
    """Promise: each number of the catalog stands in exactly one group."""
    expected = {int(number): action for action, numbers in GROUPS.items() for number in numbers.split()}
    assert {number: action_of(number) for number in known_xids()} == expected


@pytest.mark.parametrize("xid", range(200))
def test_every_xid_has_its_weight(xid: int) -> None:
    """Promise: a number asks for what the table says; one that is only logged, or unknown, asks for nothing."""
    ((verdict,),) = heard((xid, 1))
    action = action_of(xid)
    nothing = (Cause.GPU_DEGRADED, Severity.NOTICE, Certainty.HINT)
    expected = nothing if action is None else WEIGHT.get(action, nothing)
    assert (verdict.cause, verdict.severity, verdict.certainty) == expected
    assert verdict.fingerprint == f"xid {xid}"


@given(st.sampled_from(sorted(map(int, GROUPS[XidAction.RESTART].split()))), st.lists(st.integers(1, 3), max_size=12))
def test_a_gpu_that_asks_for_restarts_again_is_bad(xid: int, growth: list[int]) -> None:
    """Promise: the first XID of a generation restarts the workers, in a later generation it evicts; a flood within one
    generation is one verdict."""
    generations = [1, *(1 + sum(growth[: i + 1]) for i in range(len(growth)))]
    said = heard(*[(xid, each) for generation in generations for each in (generation, generation)])
    severities = [[each.severity for each in verdicts] for verdicts in said]
    assert severities == [[Severity.WORKERS], [], *[[Severity.NODE], []] * len(growth)]


def test_restarts_long_ago_are_forgotten() -> None:
    """Promise: what a GPU did before the window of evidence is not held against it."""
    judge = GpuJudge("node1", GpuLimits(repeat_s=50.0))
    for number, generation in enumerate((1, 2, 3)):
        (verdict,) = judge.xid(XidEvent(t_s=60.0 * number, index=3, xid=31), Carrier(5, 40, generation))
        assert verdict.severity is Severity.WORKERS


def test_the_drivers_own_word_comes_first() -> None:
    """Promise: what the driver says with an XID is a proof, comes before the number's own verdict, and is not repeated
    by the next reading."""
    judge = GpuJudge("node1", LIMITS)
    judge.sample(HEALTHY, CARRIER)
    said = judge.xid(XidEvent(t_s=1.0, index=3, xid=154, recovery=Recovery.GPU_RESET), CARRIER)
    assert [each.fingerprint for each in said] == ["gpu recovery gpu_reset", "xid 154"]
    assert (said[0].severity, said[0].certainty) == (Severity.NODE, Certainty.PROOF)
    assert judge.sample(msgspec.structs.replace(HEALTHY, t_s=2.0, recovery=Recovery.GPU_RESET), CARRIER) == []


def test_45_follows_its_companion() -> None:
    """Promise: a 45 behind another XID says nothing of its own; a lone one is noted."""
    judge = GpuJudge("node1", LIMITS)
    judge.xid(XidEvent(t_s=1.0, index=3, xid=31), CARRIER)
    assert judge.xid(XidEvent(t_s=1.2, index=3, xid=45), CARRIER) == []
    (alone,) = judge.xid(XidEvent(t_s=1.3, index=4, xid=45), CARRIER)
    assert alone.severity is Severity.NOTICE


@pytest.mark.parametrize(("recovery", "severity"), [(0, Severity.NOTICE), (None, Severity.NODE)])
def test_a_contained_error_costs_the_program_only(recovery: int | None, severity: Severity) -> None:
    """Promise: an uncorrected error that the driver contained (XID 94) and wants nothing for evicts nobody; where the
    driver does not say so, it does."""
    judge = GpuJudge("node1", LIMITS)
    judge.sample(msgspec.structs.replace(HEALTHY, recovery=recovery), CARRIER)
    (restart,) = judge.xid(XidEvent(t_s=3.0, index=3, xid=94, recovery=recovery), CARRIER)
    assert restart.severity is Severity.WORKERS
    rise = msgspec.structs.replace(HEALTHY, t_s=4.0, uncorrected=2, recovery=recovery)
    assert [each.severity for each in judge.sample(rise, CARRIER)] == [severity]
    later = msgspec.structs.replace(HEALTHY, t_s=100.0, uncorrected=3, recovery=recovery)
    assert [each.fingerprint for each in judge.sample(later, CARRIER)][-1:] == ["ecc uncorrected"][: recovery == 0]


def test_a_driver_that_hangs_again_is_likely_broken() -> None:
    """Promise: one call that does not return is a hint, the second one is more, a caller that cannot be killed too."""
    judge = GpuJudge("node1", LIMITS)
    first, second = (judge.stuck(t_s, 3, "nvmlDeviceGetName", 10.0, False, CARRIER) for t_s in (0.0, 20.0))
    assert [each[0].certainty for each in (first, second)] == [Certainty.HINT, Certainty.LIKELY]
    assert "nvmlDeviceGetName" in second[0].evidence[0]
    (unkillable,) = GpuJudge("node1", LIMITS).stuck(0.0, 3, "nvmlDeviceGetName", 10.0, True, CARRIER)
    assert unkillable.certainty is Certainty.LIKELY
    silent = GpuJudge("node1", LIMITS)
    assert [each.certainty for _ in range(3) for each in silent.silent(30.0, "R", CARRIER)] == [Certainty.HINT]

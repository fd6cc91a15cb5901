"""Schedules simulated: tables worked by hand, and the oracle on schedules of every kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules import text
from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.dataflow import Port
from megatron_disagmoe.schedules.lowering import lowered
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate, simulate_orders
from megatron_disagmoe.simulator.timeline import Timeline
from tests.schedules.strategies import ports_in_order, runnable_computes, sent_late
from tests.simulator import oracle
from tests.simulator.strategies import stage_costs

A0, A1, F0 = Group(Side.A, 0), Group(Side.A, 1), Group(Side.F, 0)


def parsed(*lines: str, attention: str, ffn: str, micro_batches: int) -> Schedule:
    groups = [1 + max(map(int, held.split())) for held in (attention, ffn)]
    head = f"attention-groups {groups[0]}\nffn-groups {groups[1]}\nmicro-batches {micro_batches}\nforward-only no\n"
    return text.loads(f"{text.FORMAT}\n{head}attention {attention}\nffn {ffn}\n" + "\n".join(lines))


def table(timeline: Timeline) -> dict[str, list[str]]:
    """``F0.1 2-3`` for every span."""
    result = {}
    for spans, way in ((timeline.compute, ""), (timeline.transfers, ">")):
        for group, mine in spans.items():
            result[f"{group}{way}"] = [
                f"{text.action_text(span.action).lstrip('>')} {span.start:g}-{span.end:g}" for span in mine
            ]
    return result


def test_one_layer_worked_by_hand() -> None:
    """Two micro-batches through A0, F0 and the tail on A0; A 1, F 2, M2N 0.5, N2M 0.25, tail 0.5, backward twice."""
    schedule = parsed(
        "A0: F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1",
        "F0: F0.0 F0.1 B0.0 B0.1",
        attention="0 0",
        ffn="0",
        micro_batches=2,
    )
    timeline = simulate(schedule, StageCosts(attention=1, ffn=2, transfer=0.5, combine=0.25, tail=0.5))
    assert table(timeline) == {
        "A0": [
            "F0.0 0-1",
            "F0.1 1-2",
            "F1.0 3.75-4.25",
            "B1.0 4.25-5.25",
            "F1.1 5.75-6.25",
            "B1.1 6.25-7.25",
            "B0.0 10-12",
            "B0.1 14-16",
        ],
        "F0": ["F0.0 1.5-3.5", "F0.1 3.5-5.5", "B0.0 5.5-9.5", "B0.1 9.5-13.5"],
        "A0>": ["M2N/0.0 1-1.5", "M2N/0.1 2-2.5", "dN2M/0.0 5.25-5.5", "dN2M/0.1 7.25-7.5"],
        "F0>": ["N2M/0.0 3.5-3.75", "N2M/0.1 5.5-5.75", "dM2N/0.0 9.5-10", "dM2N/0.1 13.5-14"],
    }
    assert timeline.makespan == 16


def test_activations_and_gradients_contend_for_a_port() -> None:
    """F0 finishes a forward and a backward at once; both leave through its one sending port, who is ready first first.

    Layer 0 on A0, layer 1 on A1, the tail on A0; transfers of 4 are long enough to meet.
    """
    schedule = parsed(
        "A0: F0.0 F0.1 F2.0 B2.0 F2.1 B2.1 B0.0 B0.1",
        "A1: F1.0 F1.1 B1.0 B1.1",
        "F0: F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1",
        attention="0 1 0",
        ffn="0 0",
        micro_batches=2,
    )
    timeline = simulate(schedule, StageCosts(attention=1, ffn=1, transfer=4))
    # F0 receives micro-batch 1 only after micro-batch 0: A0 sends one at a time
    assert table(timeline)["A0>"][:2] == ["M2N/0.0 1-5", "M2N/0.1 5-9"]
    # it sends N2M/0.0 to A1 from 6 to 10; meanwhile F0.1 becomes ready at 10 and follows; A1 sends back at once
    assert table(timeline)["F0>"][:2] == ["N2M/0.0 6-10", "N2M/0.1 10-14"]
    assert table(timeline)["A1>"][:2] == ["M2N/1.0 11-15", "M2N/1.1 15-19"]
    # F0 receives M2N/1.1 from 15 to 19, and the gradient of N2M/1.0 when A0's tail has it: 16 + 4 = 20
    assert table(timeline)["F0"][2:5] == ["F1.0 15-16", "F1.1 19-20", "B1.0 24-26"]


def test_times_of_single_actions_instead_of_the_costs() -> None:
    """One micro-batch: 1, M2N 0.5, 2, N2M 0.25, tail 0.5 and 1, then back 0.25, 4, 0.5, 2."""
    schedule = parsed("A0: F0.0 F1.0 B1.0 B0.0", "F0: F0.0 B0.0", attention="0 0", ffn="0", micro_batches=1)
    costs = StageCosts(attention=1, ffn=2, transfer=0.5, combine=0.25, tail=0.5)
    orders = Orders.of(schedule)
    assert simulate_orders(orders, costs).makespan == 12
    slow_ffn = np.array([1, 0.5, 1, 2, 5, 4.5])  # of A0's four actions, then F0's two; its F takes 3 more, its B 0.5
    run = simulate_orders(orders, costs, compute=slow_ffn)
    assert run.makespan == 15.5
    assert (run.transfer_end - run.transfer_start).sum() == 1.5  # transfers are still those of the costs


def test_messages_that_arrive_late_and_pauses_between_actions() -> None:
    """Two micro-batches through one layer and back; stages of 1, backwards of 2, tail of 1 and 2, transfers of 4."""
    schedule = parsed(
        "A0: F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1",
        "F0: F0.0 F0.1 B0.0 B0.1",
        attention="0 0",
        ffn="0",
        micro_batches=2,
    )
    orders, costs = Orders.of(schedule), StageCosts(attention=1, ffn=1, transfer=4, tail=1)
    plain = simulate_orders(orders, costs)
    late = simulate_orders(orders, costs, latency=(2, 3))
    # the port is free again when the bytes have gone (1-5, 5-9); the FFN group has them 2 later
    assert list(plain.transfer_start[:2]) == list(late.transfer_start[:2]) == [1, 5]
    assert list(plain.start[8:10]) == [5, 9]
    assert list(late.start[8:10]) == [7, 11]
    # and A0 has the answers, sent at 8, 3 after their bytes
    assert list(plain.start[2:4]) == [10, 14]
    assert list(late.start[2:4]) == [15, 19]
    # a pause of 6 after each action holds up the group's next one, not the message: F0.1 starts at 7, its bytes go at 8
    slow = simulate_orders(orders, costs, between=np.full(12, 6.0))
    assert list(slow.start[:2]) == [0, 7]
    assert list(slow.transfer_start[:2]) == [1, 8]
    assert list(slow.start[8:10]) == [5, 12]


def test_lanes_use_ports_where_they_cost() -> None:
    schedule = sequential(Placement(2, 1, (0, 1), (0,)), num_micro_batches=1)
    free = simulate(schedule, StageCosts(attention=1, ffn=1, transfer=1, tail=1))
    assert [span.action.edge for span in free.transfers[A0]] == [Edge.M2N]
    paid = simulate(schedule, StageCosts(attention=1, ffn=1, transfer=1, tail=1, lane=7))
    # the dispatch leaves first, then the lane, which keeps A1's port from the combine (ready at 3) until 9
    assert table(paid)["A0>"] == ["M2N/0.0 1-2", "LANE/0.0 2-9"]
    assert table(paid)["F0>"] == ["N2M/0.0 9-10", "dM2N/0.0 21-22"]
    # and so on the way back
    assert table(paid)["A1>"] == ["dN2M/0.0 13-14", "dLANE/0.0 14-21"]
    assert paid.makespan == 24


def test_dispatched_again() -> None:
    """``D`` takes no time; the F stage's backward waits for what it sends, and runs its forward (1) again."""
    schedule = parsed("A0: F0.0 F1.0 B1.0 D0.0 B0.0", "F0: F0.0 B0.0", attention="0 0", ffn="0", micro_batches=1)
    costs = StageCosts(attention=1, ffn=1, transfer=3, combine=1, tail=1)
    timeline = simulate(schedule, costs)
    assert table(timeline) == {
        "A0": ["F0.0 0-1", "F1.0 6-7", "B1.0 7-9", "B0.0 19-21"],
        "F0": ["F0.0 4-5", "B0.0 13-16"],
        # at 9 the gradient and the repeated dispatch are ready, and leave A0 one after the other
        "A0>": ["M2N/0.0 1-4", "dN2M/0.0 9-10", "AGAIN/0.0 10-13"],
        "F0>": ["N2M/0.0 5-6", "dM2N/0.0 16-19"],
    }


def test_split_backward_and_recomputation() -> None:
    lines = ("A0: F0.0 F1.0 I1.0 I0.0 W0.0 W1.0", "F0: F0.0 I0.0 W0.0")
    schedule = parsed(*lines, attention="0 0", ffn="0", micro_batches=1)
    costs = StageCosts(
        attention=1, ffn=2, transfer=1, tail=4, backward_ratio=3, weight_fraction=0.25, recompute_attention=0.5
    )
    spans = {text.action_text(span.action): span.end - span.start for span in simulate(schedule, costs).compute[A0]}
    # the tail is not recomputed; I takes three quarters of three forwards, W one
    assert spans == {"F0.0": 1, "F1.0": 4, "I1.0": 9, "I0.0": 2.75, "W0.0": 0.75, "W1.0": 3}
    assert [span.end - span.start for span in simulate(schedule, costs).compute[F0]] == [2, 4.5, 1.5]


def test_orders_that_wait_in_a_circle() -> None:
    schedule = parsed("A0: F1.0 F0.0 B1.0 B0.0", "F0: F0.0 B0.0", attention="0 0", ffn="0", micro_batches=1)
    with pytest.raises(ValueError, match="never start"):
        simulate(schedule, StageCosts(attention=1, ffn=1, transfer=1))


def test_transfers_in_the_file_change_nothing() -> None:
    placement = Placement.round_robin(num_layers=3, num_attention_groups=2, num_ffn_groups=1)
    schedule = sequential(placement, num_micro_batches=3)
    costs = StageCosts(attention=1, ffn=1, transfer=0.5, lane=0.25)
    with_transfers = dataclasses.replace(simulate(lowered(schedule), costs), schedule=schedule)
    assert with_transfers == simulate(schedule, costs)


def test_what_is_sent_late_lets_a_gradient_go_first() -> None:
    """Sent when it is made, M2N of micro-batch 1 holds the port from 3 to 5; the gradient is there at 4.5."""
    lines = ("A0: F0.0 F0.1 {}F1.0 B1.0 {}B0.0 F1.1 B1.1 B0.1", "F0: F0.0 B0.0 F0.1 B0.1")
    costs = StageCosts(attention=1, ffn=0.5, transfer=2, combine=1)
    sent = []
    for at_once, late in ((">M2N/0.1 ", ""), ("", ">dN2M/0.0 >M2N/0.1 ")):
        written = (lines[0].format(at_once, late), lines[1])
        timeline = simulate(parsed(*written, attention="0 0", ffn="0", micro_batches=2), costs)
        sent.append(table(timeline)["A0>"])
    assert sent[0] == ["M2N/0.0 1-3", "M2N/0.1 3-5", "dN2M/0.0 5-6", "dN2M/0.1 11-12"]
    assert sent[1] == ["M2N/0.0 1-3", "dN2M/0.0 4.5-5.5", "M2N/0.1 5.5-7.5", "dN2M/0.1 10.5-11.5"]


def test_a_port_in_order_waits_for_what_is_to_come() -> None:
    """F0 takes M2N(1) of micro-batch 0, made at 7, before M2N(0) of micro-batch 1, which could begin at 3."""
    schedule = parsed(
        "A0: <N2M/1.0 <LANE/1.0 <N2M/1.1 <LANE/1.1 F0.0 >M2N/0.0 >LANE/0.0 F0.1 >M2N/0.1 >LANE/0.1 F2.0 F2.1",
        "A1: <N2M/0.0 <LANE/0.0 <N2M/0.1 <LANE/0.1 F1.0 >M2N/1.0 >LANE/1.0 F1.1 >M2N/1.1 >LANE/1.1",
        "F0: <M2N/0.0 <M2N/1.0 <M2N/0.1 <M2N/1.1 F0.0 >N2M/0.0 F1.0 >N2M/1.0 F0.1 >N2M/0.1 F1.1 >N2M/1.1",
        attention="0 1 0",
        ffn="0 0",
        micro_batches=2,
    )
    costs = StageCosts(attention=1, ffn=1, transfer=2)
    as_it_comes = dataclasses.replace(schedule, forward_only=True)
    in_order = dataclasses.replace(as_it_comes, ports_in_order=True)
    assert table(simulate(as_it_comes, costs))["A0>"] == ["M2N/0.0 1-3", "M2N/0.1 3-5"]
    assert table(simulate(in_order, costs))["A0>"] == ["M2N/0.0 1-3", "M2N/0.1 9-11"]


@settings(max_examples=200, deadline=None)
@given(runnable_computes() | sent_late(runnable_computes()) | ports_in_order(runnable_computes()), stage_costs())
def test_equal_to_the_oracle(schedule: Schedule, costs: StageCosts) -> None:
    """Any order, splits, re-dispatches, lanes, late sends, ports in order: every span when the oracle has it."""
    tasks = oracle.schedule_tasks(schedule, costs)
    if not oracle.run(tasks):
        with pytest.raises(ValueError, match="never start"):
            simulate(schedule, costs)
        return
    timeline = simulate(schedule, costs)
    found: dict[oracle.Name, float] = {}
    for spans in (timeline.compute, timeline.transfers):
        for group, mine in spans.items():
            for action, start, _ in mine:
                if action.edge is None:
                    found[group, action] = start
                else:
                    found[Port(action.edge, action.gradient, action.layer), action.micro_batch] = start
    expected = {name: float(task.start or 0) for name, task in tasks.items() if not _is_dispatch(name)}
    assert found == pytest.approx(expected)
    computes = [task for name, task in tasks.items() if not isinstance(name[0], Port)]
    assert timeline.makespan == pytest.approx(float(max((t.start or 0) + t.duration for t in computes)))
    run = simulate_orders(Orders.of(schedule), costs)
    assert run.makespan == timeline.makespan


def _is_dispatch(name: oracle.Name) -> bool:
    return isinstance(name[1], Action) and name[1].kind is Kind.D  # no span of its own


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention": 0}, "attention is 0; a stage takes time"),
        ({"ffn": -1}, "ffn is -1; a stage cost is a finite number"),
        ({"transfer": float("nan")}, "transfer is nan"),
        ({"combine": float("inf")}, "combine is inf"),
        ({"weight_fraction": 1.5}, "weight_fraction is 1.5; it is a share"),
        ({"recompute_ffn": 2}, "recompute_ffn is 2; it is a share"),
    ],
)
def test_costs_that_make_no_sense(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageCosts(**{"attention": 1, "ffn": 1, "transfer": 1, **change})

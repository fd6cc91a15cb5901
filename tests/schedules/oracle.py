"""Is a schedule safe? Answered by running it: slow, simple, and sharing no code with the verifier.

Every group executes its list; data are tokens that stages make, transfers move and other stages use up. Sends block
until their receive is posted. Anything a real run would stumble over raises ``Unsafe``.
"""

from __future__ import annotations

from collections import Counter, deque

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Schedule, Side

Item = tuple[Edge, bool, int, int]  # edge, gradient, layer, micro-batch


class Unsafe(Exception):
    """What went wrong in the run."""


class _Group:
    def __init__(self, name: Group, actions: tuple[Action, ...]) -> None:
        self.name = name
        self.actions = actions
        self.at = 0
        self.made: dict[Item, None] = {}  # ready to be sent
        self.arrived: set[Item] = set()  # received, not used yet
        self.done: Counter[tuple[Kind, int, int]] = Counter()
        self.live: set[tuple[int, int]] = set()


class _Run:
    def __init__(self, schedule: Schedule, max_live: int | None, max_posted: int | None) -> None:
        self.schedule, self.placement = schedule, schedule.placement
        self.layers, self.micro_batches = self.placement.num_layers, schedule.num_micro_batches
        self.max_live, self.max_posted = max_live, max_posted
        for group, actions in schedule.actions.items():
            if actions and group not in self.placement.groups:
                raise Unsafe(f"{group} does not exist")
        self.groups = {name: _Group(name, schedule.actions.get(name, ())) for name in self.placement.groups}
        self.posted: dict[tuple[Edge, bool, Group, Group], deque[Item]] = {}
        self.turns: dict[Group, deque[Item]] = {name: deque() for name in self.groups}  # of receiving ports in order
        self.outstanding: Counter[tuple[Edge, bool, Group, Group]] = Counter()
        self.again = {
            (a.layer, a.micro_batch)
            for name, group in self.groups.items()
            for a in group.actions
            if name.side is Side.A and a.kind is Kind.D
        }

    def run(self) -> None:
        progress = True
        while progress:
            progress = False
            for group in self.groups.values():
                if group.at < len(group.actions) and self.step(group, group.actions[group.at]):
                    group.at += 1
                    progress = True
        self.check_end()

    def step(self, group: _Group, action: Action) -> bool:
        """Try one action; False where it has to wait."""
        if not 0 <= action.micro_batch < self.micro_batches or action.layer < 0:
            raise Unsafe("no such stage")
        if action.kind is Kind.SEND:
            return self.send(group, action)
        if action.kind is Kind.RECV:
            return self.receive(group, action)
        if action.edge is not None or action.gradient:
            raise Unsafe("a compute action with an edge")
        return self.compute(group, action)

    def channel(self, action: Action) -> tuple[Edge, bool, Group, Group]:
        edge, gradient, layer = action.edge, action.gradient, action.layer
        if edge is None or layer >= self.layers or (self.schedule.forward_only and gradient):
            raise Unsafe("no such transfer")
        attention, after = self.placement.attention[layer], self.placement.attention[layer + 1]
        left, right = Group(Side.A, attention), Group(Side.F, self.placement.ffn[layer])
        if edge is Edge.N2M:
            left, right = right, Group(Side.A, after)
        elif edge is Edge.LANE:
            right = Group(Side.A, after)
        if left == right or (edge is Edge.AGAIN and gradient):
            raise Unsafe("no such transfer")
        return (edge, gradient, right, left) if gradient else (edge, gradient, left, right)

    def channel_of_item(self, item: Item) -> tuple[Edge, bool, Group, Group]:
        return self.channel(Action(Kind.SEND, item[2], item[3], item[0], item[1]))

    def send(self, group: _Group, action: Action) -> bool:
        channel = self.channel(action)
        assert action.edge is not None
        item = (action.edge, action.gradient, action.layer, action.micro_batch)
        if channel[2] != group.name or item not in group.made:
            raise Unsafe(f"{group.name} sends {item} that it does not have")
        queue = self.posted.get(channel)
        if not queue:
            return False
        turns = self.turns[channel[3]]
        if self.schedule.ports_in_order and item[0] is not Edge.LANE and item in turns:
            if turns[0] != item:
                return False
            turns.popleft()
        if queue.popleft() != item:
            raise Unsafe(f"{item} lands in the wrong buffer")
        del group.made[item]
        self.groups[channel[3]].arrived.add(item)
        return True

    def receive(self, group: _Group, action: Action) -> bool:
        channel = self.channel(action)
        assert action.edge is not None
        if channel[3] != group.name:
            raise Unsafe("received by another group")
        self.posted.setdefault(channel, deque()).append(
            (action.edge, action.gradient, action.layer, action.micro_batch)
        )
        if action.edge is not Edge.LANE:
            self.turns[group.name].append((action.edge, action.gradient, action.layer, action.micro_batch))
        self.outstanding[channel] += 1
        if self.max_posted is not None and self.outstanding[channel] > self.max_posted:
            raise Unsafe("too many receives posted")
        return True

    def compute(self, group: _Group, action: Action) -> bool:
        kind, layer, micro_batch = action.kind, action.layer, action.micro_batch
        attention = group.name.side is Side.A
        holders = self.placement.attention if attention else self.placement.ffn
        if layer >= len(holders) or holders[layer] != group.name.index:
            raise Unsafe("another group's stage")
        if self.schedule.forward_only and kind is not Kind.F:
            raise Unsafe("backward in a forward-only schedule")
        done = {k for k in Kind if group.done[k, layer, micro_batch]}
        if kind in done:
            raise Unsafe("done twice")
        if kind is Kind.D:
            if not attention or layer >= self.layers or Kind.F not in done or done & {Kind.B, Kind.I}:
                raise Unsafe("dispatched again at the wrong time")
            group.made[Edge.AGAIN, False, layer, micro_batch] = None
            group.done[kind, layer, micro_batch] += 1
            return True
        if kind is Kind.W:
            if Kind.I not in done:
                raise Unsafe("W before I")
            group.live.discard((layer, micro_batch))
            group.done[kind, layer, micro_batch] += 1
            return True
        backward = kind is not Kind.F
        if backward and (Kind.F not in done or done & {Kind.B, Kind.I}):
            raise Unsafe("backward before forward, or twice")
        needs, makes = self.ends(attention, backward, layer, micro_batch)
        if not needs <= group.arrived:
            return False
        self.use(group, needs)
        for item in makes:
            source = self.placement.attention[item[2]]
            if item[0] is Edge.LANE and source == self.placement.attention[item[2] + 1]:
                group.arrived.add(item)
            else:
                group.made[item] = None
        self.count_live(group, action)
        group.done[kind, layer, micro_batch] += 1
        return True

    def ends(self, attention: bool, backward: bool, layer: int, micro_batch: int) -> tuple[set[Item], list[Item]]:
        """What a stage needs and makes."""
        left = [(Edge.N2M, layer - 1), (Edge.LANE, layer - 1)] if layer > 0 else []
        right = [(Edge.M2N, layer), (Edge.LANE, layer)] if layer < self.layers else []
        if not attention:
            left, right = [(Edge.M2N, layer)], [(Edge.N2M, layer)]
        needs, makes = (right, left) if backward else (left, right)
        need = {(edge, backward, at, micro_batch) for edge, at in needs}
        if backward and not attention and (layer, micro_batch) in self.again:
            need.add((Edge.AGAIN, False, layer, micro_batch))
        return need, [(edge, backward, at, micro_batch) for edge, at in makes]

    def use(self, group: _Group, items: set[Item]) -> None:
        group.arrived -= items
        for edge, gradient, layer, micro_batch in items:
            if edge is Edge.LANE and self.placement.attention[layer] == self.placement.attention[layer + 1]:
                continue
            self.outstanding[self.channel_of_item((edge, gradient, layer, micro_batch))] -= 1

    def count_live(self, group: _Group, action: Action) -> None:
        key = action.layer, action.micro_batch
        group.live.add(key)
        if self.max_live is not None and len(group.live) > self.max_live:
            raise Unsafe("too many activations")
        dropped = action.kind is Kind.F and group.name.side is Side.F and key in self.again
        if action.kind is Kind.B or dropped or self.schedule.forward_only:
            group.live.remove(key)

    def check_end(self) -> None:
        for group in self.groups.values():
            if group.at < len(group.actions):
                raise Unsafe(f"{group.name} hangs at {group.actions[group.at]}")
            if group.made or group.arrived or group.live:
                raise Unsafe("something is left over")
        if any(self.posted.values()):
            raise Unsafe("a receive is left over")
        for holders, side in ((self.placement.attention, Side.A), (self.placement.ffn, Side.F)):
            for layer, index in enumerate(holders):
                done = self.groups[Group(side, index)].done
                for micro_batch in range(self.micro_batches):
                    kinds = {k for k in (Kind.F, Kind.B, Kind.I, Kind.W) if done[k, layer, micro_batch]}
                    if self.schedule.forward_only:
                        good = kinds == {Kind.F}
                    else:
                        good = kinds in ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W})
                    if not good:
                        raise Unsafe("work is missing")


def why_unsafe(schedule: Schedule, *, max_live: int | None = None, max_posted: int | None = None) -> str | None:
    """What goes wrong when ``schedule`` runs, None where it ends well."""
    try:
        _Run(schedule, max_live, max_posted).run()
    except Unsafe as verdict:
        return str(verdict)
    return None

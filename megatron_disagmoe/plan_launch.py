"""From a plan to the processes of every node: rank, role, environment, command. Starts them, or only prints them.

    python -m megatron_disagmoe.plan_launch PLAN --node I --master HOST [--dry-run] [--script FILE] [-- FLAGS]

A plan says which global ranks sit on which node, and these are seldom consecutive, so ``torchrun``'s numbering would
put groups on other nodes than the plan has them. Hence each process gets its rank from here. Nor need rank 0 be on node
0, whose host everybody knows: so not rank 0 serves the store that ranks meet at but node 0's launcher, as torchrun's
agent would.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.hosts import seats
from megatron_disagmoe.planner.model_export import megatron_model_flags
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.plan_file import load_plan
from megatron_disagmoe.planner.verify import verify_plan

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

#: Where launchers whose ranks have ended count themselves, and how long node 0's waits for the others.
_LEFT, _FAREWELL = "plan_launch/left", timedelta(seconds=60)


@dataclass(frozen=True)
class Process:
    """One rank. ``role``: group, replica and number, for people."""

    node: int
    rank: int
    role: str
    environment: dict[str, str]
    command: tuple[str, ...]

    def line(self) -> str:
        """For a shell."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), shlex.join(self.command)])


def processes(plan_path: Path, *, master: str, port: int, script: str | None, flags: Sequence[str]) -> list[Process]:
    """Every process of a plan, by rank.

    Raises:
        ValueError: the plan doesn't hold (``disagmoe plan verify``), or this version cannot run it.
    """
    plan = load_plan(plan_path)
    model, cluster = load_model(plan.model), load_cluster(plan.cluster)
    errors = verify_plan(plan, model, cluster)
    if errors:
        raise ValueError(f"{plan_path} does not hold: " + "; ".join(errors))
    if not plan.runs_here:
        raise ValueError(f"{plan_path}: this version cannot run it: " + "; ".join(plan.missing))
    allocation = plan.allocation(pools=tuple(pool.name for pool in cluster.pools))
    program = ["-m", "megatron_disagmoe.pretrain_gpt"] if script is None else ["-m", "megatron_disagmoe.launch", script]
    words = [
        sys.executable,
        *program,
        *megatron_model_flags(model, sequence_length=plan.batch.sequence_length),
        *plan.megatron_flags,
        "--af-pipe",
        "--af-plan",
        str(plan_path.resolve()),
        *flags,
    ]
    placed = seats(allocation, cluster, num_layers=model.num_moe_layers)
    per_node: dict[int, int] = {}
    for seat in placed:
        per_node[seat.node] = per_node.get(seat.node, 0) + 1
    found = []
    for seat in placed:
        environment = {
            "MASTER_ADDR": master,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(placed)),
            "RANK": str(seat.rank),
            "LOCAL_RANK": str(seat.gpu),
            "LOCAL_WORLD_SIZE": str(per_node[seat.node]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        role = f"{seat.group} replica {seat.replica} number {seat.number}"
        found.append(Process(seat.node, seat.rank, role, environment, tuple(words)))
    return found


def start(mine: Sequence[Process], *, num_nodes: int) -> int:
    """Run the processes of one node of ``num_nodes``; the first that fails ends the others. Their exit code.

    Raises:
        ValueError: before any is started, where the port of node 0's store is taken.
    """
    store = _serve_store(mine)
    running = [subprocess.Popen(each.command, env={**os.environ, **each.environment}) for each in mine]
    try:
        while True:
            codes = [each.poll() for each in running]
            failed = [code for code in codes if code]
            if failed:
                return failed[0]
            if all(code == 0 for code in codes):
                _leave_together(mine, store, num_nodes)
                return 0
            time.sleep(0.5)
    finally:
        for each in running:
            if each.poll() is None:
                each.terminate()
        for each in running:
            each.wait()


def _serve_store(mine: Sequence[Process]) -> TCPStore | None:
    """Where these are node 0's: the store that all ranks meet at, served as long as what is returned is kept.

    Raises:
        ValueError: the port is taken.
    """
    if mine[0].node != 0:
        return None
    from torch._C._distributed_c10d import TCPStore

    port = int(mine[0].environment["MASTER_PORT"])
    try:
        return TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise ValueError(f"--port {port} is taken on this host; choose another, the same on every node") from error


def _leave_together(mine: Sequence[Process], store: TCPStore | None, num_nodes: int) -> None:
    """Node 0 serves the store until every node's ranks have ended, or some have not for long: they have failed."""
    from torch._C._distributed_c10d import TCPStore

    at = mine[0].environment
    try:
        if store is None:
            store = TCPStore(at["MASTER_ADDR"], int(at["MASTER_PORT"]), is_master=False, timeout=_FAREWELL)
            store.add(_LEFT, 1)
            return
        store.add(_LEFT, 1)
        until = time.monotonic() + _FAREWELL.total_seconds()
        while store.add(_LEFT, 0) < num_nodes and time.monotonic() < until:
            time.sleep(0.1)
    except RuntimeError as error:  # its ranks have ended well all the same
        print(f"plan_launch: node {mine[0].node} could not tell node 0 that it is done: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``python -m megatron_disagmoe.plan_launch``; 2 on bad input."""
    parser = argparse.ArgumentParser(
        description="Start a plan's processes of one node, or print all of them.",
        epilog="After -- come more Megatron flags (data, learning rate, ...).",
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--node", type=int, help="number of this node in the plan")
    parser.add_argument("--master", default="127.0.0.1", help="host of the plan's node 0")
    parser.add_argument("--port", type=int, default=29500)
    parser.add_argument("--script", help="a Megatron pretrain script; Megatron's own GPT task where it isn't given")
    parser.add_argument("--dry-run", action="store_true", help="verify the plan, print every rank's role and command")
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    options, flags = parser.parse_args(words[:split]), words[split + 1 :]
    try:
        every = processes(
            options.plan, master=options.master, port=options.port, script=options.script, flags=flags
        )
        if not options.dry_run and options.node is None:
            raise ValueError("--node is missing: the number of this node in the plan")
        nodes = {each.node for each in every}
        if options.node is not None and options.node not in nodes:
            raise ValueError(f"--node {options.node}: the plan has nodes 0 to {max(nodes)}")
    except (ValueError, OSError) as error:
        print(f"plan_launch: {error}", file=sys.stderr)
        return 2
    mine = [each for each in every if options.node is None or each.node == options.node]
    if options.dry_run:
        for each in mine:
            print(f"node {each.node} rank {each.rank} {each.role}: {each.line()}")
        print(f"the plan holds: {len(every)} processes on {len(nodes)} nodes", file=sys.stderr)
        return 0
    try:
        return start(mine, num_nodes=len(nodes))
    except ValueError as error:
        print(f"plan_launch: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

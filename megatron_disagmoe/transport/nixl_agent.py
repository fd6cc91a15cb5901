"""A rank's end of NIXL: its two agents, their memory, and the exchange of metadata through torch's store.

Two agents, and so two connections to each peer: one for payload that leaves, one for payload that comes. A
connection works off one thing after the other, and over TCP a large write holds it until the last byte is in the
socket. What is said about messages (and UCX's own acknowledgement of a write, without which NIXL does not call it
done) travels on the connection whose payload goes the other way, so it never waits behind payload:

    rank a, out  == payload, a to b ==>  b, into
    rank a, out  <== notes and acknowledgements, b to a ==  b, into
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from megatron_disagmoe.transport.nixl_library import nixl_errors, open_agent
from megatron_disagmoe.transport.nixl_memory import RegisteredMemory, Slot
from megatron_disagmoe.transport.nixl_protocol import Offer, agent_name, agent_rank

_OUT, _INTO = "out", "into"


class WriteFailed(RuntimeError):
    """NIXL reports that a write failed."""


class Agent:
    """The two agents of this rank; collective over the ranks and ``peers`` that name each other.

    Not thread-safe: whoever calls holds the transport's lock.

    Args:
        rank: global rank.
        peers: global ranks it exchanges with.
        device: where slots live.
        store: where metadata is exchanged.

    Raises:
        ValueError: where the package ``nixl`` is missing.

    Attributes:
        errors: what NIXL's functions raise, and `WriteFailed`.
        sending: memory that payload is written from.
        receiving: memory that peers write to.
    """

    def __init__(self, *, rank: int, peers: list[int], device: torch.device, store: Store) -> None:
        self._out, self._into = (open_agent(agent_name(rank, way)) for way in (_OUT, _INTO))
        self.errors: tuple[type[Exception], ...] = (*nixl_errors(), WriteFailed)
        self._rank, self._peers, self._device, self._store = rank, peers, device, store
        self.sending = RegisteredMemory(self._out, device=device)
        self.receiving = RegisteredMemory(self._into, device=device, publish=self._publish)
        self._generation = 0
        self._known_generation = dict.fromkeys(peers, 0)
        self._missing = list(peers)
        store.set(f"{rank}/{_OUT}", self._out.get_agent_metadata())
        store.set(f"{rank}/0", self._into.get_agent_metadata())
        for peer in peers:
            self._out.add_remote_agent(store.get(f"{peer}/0"))
            self._into.add_remote_agent(store.get(f"{peer}/{_OUT}"))

    def hear(self) -> Iterator[tuple[int, bytes]]:
        """What peers have said since, in order for each of them."""
        for name, notes in self._out.get_new_notifs().items():
            for note in notes:
                yield agent_rank(name), note

    def say(self, peer: int, note: bytes) -> None:
        """Send a note (raises one of ``errors`` where the connection is gone)."""
        self._into.send_notif(agent_name(peer, _OUT), note)

    def write(self, peer: int, slot: Slot, size: int, offer: Offer) -> Any:
        """Start to write the first ``size`` bytes of ``slot`` into what ``peer`` offers; returns a handle."""
        while self._known_generation[peer] < offer.generation:
            self._known_generation[peer] += 1
            self._out.add_remote_agent(self._store.get(f"{peer}/{self._known_generation[peer]}"))
        kind, device = ("VRAM", slot.buffer.device.index) if self._device.type == "cuda" else ("DRAM", 0)
        handle = self._out.initialize_xfer(
            "WRITE",
            self._out.get_xfer_descs([(slot.address, size, device)], kind),
            self._out.get_xfer_descs([(offer.address, size, device)], kind),
            agent_name(peer, _INTO),
        )
        if self._out.transfer(handle) == "ERR":
            raise WriteFailed("the write could not be started")
        return handle

    def is_written(self, handle: Any) -> bool:
        """Whether all of a write is in the peer's memory; if so, its handle is freed."""
        status = self._out.check_xfer_state(handle)
        if status == "ERR":
            raise WriteFailed("the write failed")
        if status == "DONE":
            self._out.release_xfer_handle(handle)
        return bool(status == "DONE")

    def _publish(self, registration: Any) -> int:
        """Tell peers about new memory; returns the generation of the metadata that describes it."""
        self._generation += 1
        metadata = self._into.get_partial_agent_metadata(registration, False, ["UCX"])
        self._store.set(f"{self._rank}/{self._generation}", metadata)
        return self._generation

    def say_bye(self) -> None:
        """Let peers know that this rank needs nothing more."""
        self._store.set(f"{self._rank}/bye", "")

    def all_said_bye(self) -> bool:
        """Whether every peer has."""
        try:
            self._missing = [peer for peer in self._missing if not self._store.check([f"{peer}/bye"])]
        except RuntimeError:  # the store's host has gone, so it had seen everybody's bye
            return True
        return not self._missing

    def close(self) -> None:
        """Undo registrations and connections."""
        self.sending.close()
        self.receiving.close()
        for peer in self._peers:
            self._out.remove_remote_agent(agent_name(peer, _INTO))
            self._into.remove_remote_agent(agent_name(peer, _OUT))
        del self._out, self._into

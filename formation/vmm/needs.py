"""What this room needs of the rooms below, no more: `state.service` and `pack.service` fit, and so do the fakes of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from formation.core.event import Event
from formation.core.ids import Digest, NodeId
from formation.core.spec import ImageRecord, NodeRecord, VmRecord
from formation.state.feed import Level


class StateView(Protocol):
    """Typed records of the replicated state."""

    def vms(self, level: Level = Level.CERTIFIED) -> tuple[VmRecord, ...]:
        """All VMs that are not deleted."""
        ...

    def vm(self, vm_id: str, level: Level = Level.CERTIFIED) -> VmRecord | None:
        """One VM; None when unknown or deleted."""
        ...

    def vm_is_deleted(self, vm_id: str, level: Level = Level.CERTIFIED) -> bool:
        """Whether its owner asked for its end."""
        ...

    def nodes(self, level: Level = Level.CERTIFIED) -> tuple[NodeRecord, ...]:
        """All nodes that described themselves."""
        ...

    def node(self, node_id: str, level: Level = Level.CERTIFIED) -> NodeRecord | None:
        """One node."""
        ...

    def image(self, digest: str, level: Level = Level.CERTIFIED) -> ImageRecord | None:
        """One image."""
        ...


class State(Protocol):
    """The replicated state, as this room reads and writes it. A token is opaque here."""

    @property
    def view(self) -> StateView:
        """The records."""
        ...

    async def append_event(self, event: Event, object_id: str, *, level: Level = Level.OBSERVED) -> Any:
        """Say something; returns when it is durable here, or at the level asked for. The timeout is the caller's.

        Raises:
          ConflictError: at level FINAL, it has no effect: says why.
          FormationError: it was not taken.
        """
        ...

    def lease_deadline_s(self, space: str, key: str, *, sent_ms: int, sent_s: float) -> float | None:
        """When this node must have begun to stop using a lease, by trio's clock; None: it does not hold it.

        Args:
          sent_ms, sent_s: wall clock and trio's clock when it sent what gave it the lease as it stands.
        """
        ...


class Image(Protocol):
    """An image that is complete and verified on this node."""

    @property
    def kernel_path(self) -> Path:
        """PVH ELF file."""
        ...

    @property
    def initrd_paths(self) -> tuple[Path, ...]:
        """Archives (newc cpio), to be concatenated."""
        ...

    @property
    def cached(self) -> bool:
        """Whether it was here already."""
        ...

    @property
    def pulled_bytes(self) -> int:
        """What was transferred for this call."""
        ...

    @property
    def pulled_from(self) -> str:
        """NodeId, or empty."""
        ...


class Pack(Protocol):
    """The image manager, as this room uses it."""

    async def resolve_image(self, digest: Digest, *, holders: Sequence[NodeId], progress: Callable[[Any], None]) -> Image:
        """Have the image here, pulled if need be."""
        ...

"""QMP over a socket, and how a VM's sockets are reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog
import trio

from formation.core.errors import HostError
from formation.vmm.console import CHUNK_SIZE_MAX_BYTES
from formation.vmm.qmp import Greeting, Message, QmpCodec, QmpEvent, Reply

log = structlog.get_logger(__name__)

COMMAND_DEADLINE_S = 10.0
# Between two looks for a socket that does not exist yet.
CONNECT_RETRY_S = 0.02


class QmpConnection:
    """QMP over a socket: commands one at a time, events to a callback."""

    def __init__(self, stream: trio.SocketStream, on_event: Callable[[QmpEvent], None]) -> None:
        self._stream = stream
        self._on_event = on_event
        self._codec = QmpCodec()
        self._lock = trio.Lock()
        self._replies: dict[int, Reply] = {}
        self._wake = trio.Event()
        self._is_closed = False

    async def greet(self) -> str:
        """Negotiate; QEMU's version."""
        while True:
            for message in await self._receive():
                if isinstance(message, Greeting):
                    return message.version
                self._take(message)

    async def read_all(self) -> None:
        """Take answers and events until the connection ends."""
        try:
            while True:
                for message in await self._receive():
                    self._take(message)
        except HostError as exc:
            log.debug("qmp.ended", error=str(exc))
        finally:
            self._is_closed = True
            self._notify()

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Do a command; `read_all` must run beside it.

        Raises:
          HostError: refused, no answer in time, or the connection ended.
        """
        async with self._lock:
            command_id, data = self._codec.encode_command(name, arguments)
            with trio.move_on_after(COMMAND_DEADLINE_S):
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                    raise HostError(f"{name}: the hypervisor is gone", hint="see the VM's log") from exc
                while command_id not in self._replies and not self._is_closed:
                    await self._wake.wait()
            reply = self._replies.pop(command_id, None)
            self._replies.clear()  # Late answers to commands given up on.
        if reply is None:
            state = "is gone" if self._is_closed else f"does not answer within {COMMAND_DEADLINE_S:.0f} s"
            raise HostError(f"{name}: the hypervisor {state}", hint="see the VM's log")
        if reply.error:
            raise HostError(f"{name}: {reply.error[:200]}", hint="see the node's log")
        return reply.value

    def close_nowait(self) -> None:
        """Close the socket."""
        self._stream.socket.close()

    async def _receive(self) -> list[Message]:
        try:
            data = await self._stream.receive_some(CHUNK_SIZE_MAX_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            raise HostError("the hypervisor closed its control socket", hint="see the VM's log")
        return self._codec.feed(bytes(data))

    def _take(self, message: Message) -> None:
        match message:
            case Reply():
                self._replies[message.command_id] = message
                self._notify()
            case QmpEvent():
                self._on_event(message)

    def _notify(self) -> None:
        self._wake.set()
        self._wake = trio.Event()


async def connect_unix(folder_fd: int, name: str, *, has_ended: Callable[[], bool]) -> trio.SocketStream:
    """Connect to a socket in a folder, waiting for it to appear; the deadline is the caller's.

    The path goes through the descriptor: a unix socket's path has 107 bytes at most, and folders lie deeper than that.

    Raises:
      HostError: the process that would make it has ended.
    """
    while True:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await sock.connect(f"/proc/self/fd/{folder_fd}/{name}")
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if has_ended():
                raise HostError("the hypervisor ended", hint="see the node's log") from None
            await trio.sleep(CONNECT_RETRY_S)
        except BaseException:
            sock.close()
            raise
        else:
            return trio.SocketStream(sock)

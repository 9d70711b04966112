"""One QEMU process: its connections while it lives, and its last words.

Theory of operation. `watch` owns the connections until the process ends; when the node ends first, they close and the
process goes on. The process's end is its pidfd's. Sockets are reached through a descriptor of the folder.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass

import msgspec
import structlog
import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.errors import HostError, UnavailableError
from formation.p2p.transport import TaskStatus
from formation.vmm.console import CHUNK_PAUSE_S, CHUNK_SIZE_MAX_BYTES, Console, FileLog
from formation.vmm.devices import AGENT_SOCKET, QMP_SOCKET, SERIAL_SOCKET
from formation.vmm.files import VmFolder, VmState
from formation.vmm.hypervisor import ACPI_STOP_DEADLINE_S, AGENT_STOP_DEADLINE_S, KILL_DEADLINE_S, PortLostError, StopHow
from formation.vmm.process import ProcessHandle
from formation.vmm.qmp import QmpEvent
from formation.vmm.qmp_connection import QmpConnection, connect_unix
from formation.vmm.words import describe_exit, last_line, printable

log = structlog.get_logger(__name__)

# What the dead process's sockets still hold, so that its last words are in the log.
DRAIN_DEADLINE_S = 2.0
# QEMU says what is wrong in its last line; a hostile one may say more.
STDERR_SIZE_MAX_BYTES = 4 * 1024
AGENT_LINE_SIZE_MAX_BYTES = 4 * 1024
# Lines of the console in which a kernel's panic is looked for.
PANIC_TAIL_LINES = 40

# A guest whose disk could not grow waits; it is let go on this often, and waits again if there is still no space.
DISK_RETRY_S = 5.0
DISK_FULL_NOTICE = b"\r\n[formation: the node's disk is full, this machine waits for space]\r\n"

_WAITING_STATUSES = frozenset({"prelaunch", "paused", "io-error"})

# QEMU's words for a published port that cannot be bound.
_PORT_LOST_TEXT = "Could not set up host forwarding rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Connections:
    qmp: QmpConnection
    serial: trio.SocketStream
    agent: trio.SocketStream


class QemuVm:
    """One QEMU process; see `BootedVm`."""

    def __init__(self, folder: VmFolder, process: ProcessHandle, state: VmState, clock: Clock) -> None:
        self.vm_id = folder.vm_id
        self.generation = state.generation
        self.started_ms = state.started_ms
        self.boot_ms = state.boot_ms
        self.console = Console(FileLog(folder.path), self._type)
        self._folder = folder
        self._process = process
        self._state = state
        self._clock = clock
        self._connections: _Connections | None = None
        self._typing = trio.Lock()
        self._stderr = b""
        self._stderr_ended = trio.Event()
        self._shutdown_reason = ""
        self._exit_reason = ""
        self._failure = ""
        self._settled = trio.Event()
        self._exited = trio.Event()
        self._disk_full = trio.Event()
        if self.boot_ms is not None:
            self._settled.set()

    @property
    def _open(self) -> _Connections:
        assert self._connections is not None, "watch() first"
        return self._connections

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._exited.is_set()

    async def wait_ready(self) -> int:
        """See `BootedVm`."""
        await self._settled.wait()
        if self.boot_ms is None:
            raise HostError(self._failure or self._exit_reason, hint=f"formation vm logs {self.vm_id}")
        return self.boot_ms

    async def wait_exit(self) -> str:
        """See `BootedVm`."""
        await self._exited.wait()
        return self._exit_reason

    async def stop(self, *, ask_guest: bool) -> StopHow:
        """See `BootedVm`."""
        if self.has_ended:
            return StopHow.ALREADY
        if ask_guest:
            with trio.move_on_after(AGENT_STOP_DEADLINE_S):
                try:
                    await self._open.agent.send_all(b"shutdown\n")
                    await self._exited.wait()
                    return StopHow.AGENT
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    log.warning("vm.agent_unreachable", vm_id=self.vm_id)
            with trio.move_on_after(ACPI_STOP_DEADLINE_S):
                try:
                    await self._open.qmp.execute("system_powerdown")
                    await self._exited.wait()
                    return StopHow.ACPI
                except HostError as exc:
                    log.warning("vm.powerdown_refused", vm_id=self.vm_id, error=exc.message)
            log.warning("vm.killed", vm_id=self.vm_id, why="it minded neither its agent nor ACPI")
        self._process.kill_nowait()
        with trio.move_on_after(KILL_DEADLINE_S):
            await self._exited.wait()
            return StopHow.KILL
        raise HostError(f"the process of {self.vm_id} does not end", hint="its disk hangs; see dmesg")

    async def watch(self, stderr_fd: int | None, *, task_status: TaskStatus[None]) -> None:
        """Own the connections until the process ends, or until cancelled.

        Raises:
          HostError: before `started`: the process ended, or does not answer.
        """
        error: HostError | None = None
        try:
            async with trio.open_nursery() as nursery:
                if stderr_fd is not None:
                    nursery.start_soon(self._read_stderr, trio.lowlevel.FdStream(stderr_fd))
                try:
                    await self._connect(nursery)
                except HostError as exc:
                    error = await self._start_error(exc)
                    nursery.cancel_scope.cancel()
                else:
                    task_status.started(None)
                    await self._process.wait()
                    nursery.cancel_scope.deadline = trio.current_time() + DRAIN_DEADLINE_S
        finally:
            await self._finish()
        if error is not None:
            raise error

    async def let_run(self) -> None:
        """Let a paused guest run; nothing happens to one that does.

        Raises:
          HostError: refused.
        """
        status = await self._open.qmp.execute("query-status")
        if isinstance(status, dict) and status.get("status") in _WAITING_STATUSES:
            await self._open.qmp.execute("cont")

    async def ask_agent(self) -> None:
        """Ask the guest to say again whether it is ready: its answer may have gone to a node process that died."""
        try:
            await self._open.agent.send_all(b"status\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.warning("vm.agent_unreachable", vm_id=self.vm_id)

    async def _connect(self, nursery: trio.Nursery) -> None:
        folder_fd = os.open(self._folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        streams: list[trio.SocketStream] = []
        try:
            for name in (QMP_SOCKET, SERIAL_SOCKET, AGENT_SOCKET):
                streams.append(await connect_unix(folder_fd, name, has_ended=self._is_dead))  # noqa: PERF401 - kept on failure
        except BaseException:
            for stream in streams:
                stream.socket.close()
            raise
        finally:
            os.close(folder_fd)
        qmp = QmpConnection(streams[0], self._on_event)
        self._connections = _Connections(qmp=qmp, serial=streams[1], agent=streams[2])
        await qmp.greet()
        nursery.start_soon(qmp.read_all)
        nursery.start_soon(self._read_serial, streams[1])
        nursery.start_soon(self._read_agent, streams[2])
        nursery.start_soon(self._wait_for_space)
        await qmp.execute("qmp_capabilities")

    async def _start_error(self, error: HostError) -> HostError:
        with trio.move_on_after(DRAIN_DEADLINE_S):
            await self._process.wait()
            await self._stderr_ended.wait()
        text = self._stderr.decode(errors="replace")
        if _PORT_LOST_TEXT in text:
            return PortLostError(f"a published port was taken meanwhile: {last_line(text)}", hint="publish another port")
        return HostError(f"QEMU did not start: {last_line(text) or error.message}", hint="see the node's log")

    def _is_dead(self) -> bool:
        poll = select.poll()
        poll.register(self._process.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def _finish(self) -> None:
        """Close all; if the process has ended, say why and clear away what only it needed."""
        if self._connections is not None:
            self._connections.qmp.close_nowait()
            self._connections.serial.socket.close()
            self._connections.agent.socket.close()
        if self._is_dead():
            status = self._process.exit_status()
            tail = b""
            with trio.CancelScope(shield=True):
                try:
                    tail = await trio.to_thread.run_sync(FileLog(self._folder.path).read_tail, PANIC_TAIL_LINES)
                    await trio.to_thread.run_sync(self._folder.drop_runtime)
                except OSError as exc:
                    # One VM's folder must not end the node; what stays is cleared at the next boot or removal.
                    log.warning("vm.folder_failed", vm_id=self.vm_id, error=exc.strerror)
            self._exit_reason = describe_exit(
                shutdown_reason=self._shutdown_reason, status=status, stderr=self._stderr, console_tail=tail
            )
            log.info("vm.process_ended", vm_id=self.vm_id, reason=self._exit_reason)
            self._exited.set()
            self._settled.set()
        self.console.close()
        self._process.close()

    def _on_event(self, event: QmpEvent) -> None:
        log.debug("qmp.event", vm_id=self.vm_id, name=event.name)
        if event.name == "SHUTDOWN":
            self._shutdown_reason = str(event.data.get("reason", ""))[:40]
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("action") == "stop":
            # QEMU's default (werror=enospc): the guest sees no error and loses nothing, and stands still.
            self._disk_full.set()

    async def _wait_for_space(self) -> None:
        """Let a guest that waits for disk space go on, again and again."""
        while True:
            await self._disk_full.wait()
            log.warning("vm.waits_for_space", vm_id=self.vm_id)
            await self.console.feed(DISK_FULL_NOTICE)
            while self._disk_full.is_set():
                self._disk_full = trio.Event()
                await trio.sleep(DISK_RETRY_S)
                try:
                    await self.let_run()
                except HostError as exc:
                    log.warning("vm.not_resumed", vm_id=self.vm_id, error=exc.message)
                    self._disk_full.set()
                # A write that fails again does so within this time, and is no news.
                await trio.sleep(DISK_RETRY_S)
            log.info("vm.has_space_again", vm_id=self.vm_id)

    async def _read_stderr(self, stream: trio.lowlevel.FdStream) -> None:
        async with stream:
            while data := await stream.receive_some(STDERR_SIZE_MAX_BYTES):
                self._stderr = (self._stderr + bytes(data))[-STDERR_SIZE_MAX_BYTES:]
                await trio.sleep(CHUNK_PAUSE_S)
            self._stderr_ended.set()

    async def _read_serial(self, stream: trio.SocketStream) -> None:
        try:
            while data := await stream.receive_some(CHUNK_SIZE_MAX_BYTES):
                await self.console.feed(bytes(data))
                await trio.sleep(CHUNK_PAUSE_S)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            log.debug("vm.console_ended", vm_id=self.vm_id, error=str(exc))

    async def _read_agent(self, stream: trio.SocketStream) -> None:
        buffer = b""
        try:
            while data := await stream.receive_some(AGENT_LINE_SIZE_MAX_BYTES):
                *lines, buffer = (buffer + bytes(data)).split(b"\n")
                for line in lines:
                    await self._take_word(line)
                buffer = buffer[-AGENT_LINE_SIZE_MAX_BYTES:]
                await trio.sleep(CHUNK_PAUSE_S)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("vm.agent_ended", vm_id=self.vm_id)

    async def _take_word(self, line: bytes) -> None:
        word, _, rest = line.strip().partition(b" ")
        match word:
            case b"ready" if self.boot_ms is None:
                boot_ms = max(0, self._clock.now_ns() // NS_PER_MS - self.started_ms)
                try:
                    await trio.to_thread.run_sync(
                        self._folder.write_state, msgspec.structs.replace(self._state, boot_ms=boot_ms)
                    )
                except HostError as exc:
                    # The next life of this node asks the guest again.
                    log.warning("vm.state_not_written", vm_id=self.vm_id, error=exc.message)
                self.boot_ms = boot_ms
                self._settled.set()
            case b"failed" if not self._settled.is_set():
                self._failure = printable(rest) or "the guest says that it failed"
                log.warning("vm.guest_failed", vm_id=self.vm_id, reason=self._failure)
                self._settled.set()
            case _:
                # Also of a service that ends and is started again: the guest says it on its console, as often as it likes.
                log.debug("vm.agent_word", vm_id=self.vm_id, word=printable(line)[:40])

    async def _type(self, data: bytes) -> None:
        async with self._typing:
            try:
                await self._open.serial.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise UnavailableError("the VM does not run", hint="formation vm start starts it") from exc

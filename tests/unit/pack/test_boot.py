"""The example image, built of Debian's packages and booted for real, as the VM manager boots it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from formation.core.config import default_values
from formation.pack.cpio import read_cpio
from formation.pack.guest import AGENT_PORT_NAME, KERNEL_ARGUMENTS, VmGuestConfig, vm_config_cpio
from formation.pack.rootfs import prepare_base
from formation.pack.service import BuildProgress, LocalImage, PackService, PullProgress
from tests.unit.pack.images import NoPeers

HELLO = Path(__file__).parents[3] / "examples" / "hello"
CACHE = Path(default_values(os.environ, is_root=os.geteuid() == 0)["node.cache_dir"])
# Strings that break every shell script that treats them as anything but data.
NASTY = (
    "plain",
    "two words",
    'it\'s "quoted"',
    "$(touch /owned) `id` $HOME",
    "line one\nline two",
    "*",
    "",
    "\\n",
    "--",
    "é ✓",
)

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
    pytest.mark.skipif(shutil.which("mke2fs", path=os.environ["PATH"] + ":/sbin:/usr/sbin") is None, reason="needs mke2fs"),
]


class Guest:
    """A running guest: its agent channel and its serial log."""

    def __init__(self, process: trio.Process, agent: trio.SocketStream, folder: Path, started_s: float) -> None:
        self.process, self._agent, self._folder, self._started_s = process, agent, folder, started_s
        self._buffer = b""

    async def line(self) -> str:
        while b"\n" not in self._buffer:
            data = await self._agent.receive_some()
            assert data, self.log()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def send(self, command: str) -> None:
        await self._agent.send_all(command.encode() + b"\n")

    def log(self) -> str:
        return (self._folder / "serial.log").read_text(errors="replace")

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s

    async def fetch(self, port: int, path: str = "/") -> bytes:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(f"GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n".encode())
            return b"".join([piece async for piece in stream])

    async def type_line(self, text: str, *, until: str) -> None:
        """Write a line to the serial console, and wait for an answer in its log."""
        socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await socket.connect(str(self._folder / "serial.sock"))
        async with trio.SocketStream(socket) as stream:
            await stream.send_all(text.encode() + b"\n")
            while until not in self.log():  # noqa: ASYNC110 - a file that another process writes
                await trio.sleep(0.05)

    async def shut_down(self) -> None:
        await self.send("shutdown")
        assert await self.line() == "stopping"
        await self.process.wait()


@asynccontextmanager
async def booted(folder: Path, image: LocalImage, config: VmGuestConfig, port: int) -> AsyncIterator[Guest]:
    """QEMU with the guest; killed at the end if it still runs."""
    disk, initrd, agent = folder / "disk", folder / "initrd", folder / "agent.sock"
    if not disk.exists():
        disk.touch()
        os.truncate(disk, 1 << 30)
        path = os.environ["PATH"] + ":/sbin:/usr/sbin"
        command = ["mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(disk)]
        await trio.run_process(command, env={"PATH": path})
    initrd.write_bytes(b"".join(p.read_bytes() for p in image.initrd_paths) + vm_config_cpio(config))
    agent.unlink(missing_ok=True)
    started_s = time.perf_counter()
    # fmt: off
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-M", "q35", "-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max", "-m", str(image.manifest.config.memory_mib),
        "-kernel", str(image.kernel_path), "-initrd", str(initrd), "-append", KERNEL_ARGUMENTS,
        "-chardev", f"socket,id=serial0,path={folder / 'serial.sock'},server=on,wait=off,logfile={folder / 'serial.log'}",
        "-serial", "chardev:serial0",
        "-drive", f"if=none,id=disk0,file={disk},format=raw", "-device", "virtio-blk-pci,drive=disk0",
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
        "-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:80", "-device", "virtio-net-pci,netdev=net0,romfile=",
        "-chardev", f"socket,id=agent0,path={agent},server=on,wait=off",
        "-device", f"virtserialport,chardev=agent0,name={AGENT_PORT_NAME}",
    ]
    # fmt: on
    process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL)
    try:
        while not agent.exists():  # noqa: ASYNC110 - a file that another process makes
            await trio.sleep(0.01)
        socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await socket.connect(str(agent))
        async with trio.SocketStream(socket) as stream:
            yield Guest(process, stream, folder, started_s)
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
            await process.wait()


async def free_port() -> int:
    with trio.socket.socket() as socket:
        await socket.bind(("127.0.0.1", 0))
        port: int = socket.getsockname()[1]
        return port


async def image_of(context: Path, data_dir: Path) -> LocalImage:
    pack = PackService(data_dir=data_dir, cache_dir=CACHE, p2p=NoPeers())

    def ignore(_: BuildProgress | PullProgress) -> None:
        return

    async with trio.open_nursery() as nursery:
        await nursery.start(pack.run)
        start_s = time.perf_counter()
        built = await pack.build_image(context, progress=ignore)
        first_s = time.perf_counter() - start_s
        again = await pack.build_image(context, progress=ignore)
        print(f"\nbuild {first_s:.3f} s, again {time.perf_counter() - start_s - first_s:.3f} s, {built.size_bytes} bytes")
        assert (again.digest, again.cached) == (built.digest, True)
        image = await pack.resolve_image(built.digest, holders=(), progress=ignore)
        nursery.cancel_scope.cancel()
    return image


CONFIG = VmGuestConfig(vm_id="vm-aaaaaaaaaaaaaaaa", hostname="hello-1")


async def test_hello_serves_its_page_and_keeps_its_disk(tmp_path: Path) -> None:
    """The example is ready when it serves its page; it shuts down when told, and boots again from the same disk."""
    image = await image_of(HELLO, tmp_path / "images")
    port = await free_port()
    with trio.fail_after(100):
        for turn in range(2):
            async with booted(tmp_path, image, CONFIG, port) as guest:
                assert await guest.line() == "ready", guest.log()
                ready_s = guest.elapsed_s()
                page = await guest.fetch(port)
                print(f"boot {turn}: ready after {ready_s:.2f} s, page after {guest.elapsed_s():.2f} s")
                assert page.startswith(b"HTTP/1.")
                assert b"a cloud without a centre" in page
                await guest.send("status")
                assert await guest.line() == "ready"
                start_s = guest.elapsed_s()
                await guest.shut_down()
                print(f"  down after {guest.elapsed_s() - start_s:.2f} s; {guest.log().count('reboot: Power down')} power down")


async def test_arguments_and_environment_are_data(tmp_path: Path) -> None:
    """No string in entrypoint, environment or configuration is ever run; all arrive as written; files outlive a stop."""
    context = tmp_path / "context"
    (context / "app").mkdir(parents=True)
    script = context / "app" / "serve"
    script.write_text(
        '#!/bin/sh\ncat /kept 2>/dev/null\necho "boot of $HOSTNAME" >>/kept\n'
        'for a; do printf "<%s>" "$a"; done >/app/args\nprintf "%s" "$ONE" >/app/one\nprintf "%s" "$TWO" >/app/two\n'
        "pwd >/app/pwd\n[ ! -e /owned ] || echo OWNED\nid -un ada >/app/ada\ntail -n 1 /etc/hosts >/app/hosts\n"
        "exec httpd -f -p 80 -h /app\n"
    )
    script.chmod(0o755)
    (context / "Formfile").write_text(
        "NAME nasty\nFROM busybox\nMEMORY 192\nCOPY app /app\nWORKDIR /srv/deep\nEXPOSE 80\n"
        "USER username:ada passwd:secret groups:sudo\n"
        "ENV ONE='$(touch /owned) `id` it\"s'\nENV --scope=service:nasty TWO=image\n"
        f"ENTRYPOINT {json.dumps(['/app/serve', *NASTY])}\n"
    )
    image = await image_of(context, tmp_path / "images")
    config = VmGuestConfig(
        vm_id="vm-aaaaaaaaaaaaaaaa",
        hostname="nasty-1",
        env={"TWO": "from the VM $(touch /owned)\nend", "not.an-identifier": "1"},
    )
    port = await free_port()
    with trio.fail_after(100):
        for _ in range(2):
            async with booted(tmp_path, image, config, port) as guest:
                assert await guest.line() == "ready", guest.log()

                async def body(path: str, guest: Guest = guest) -> str:
                    return (await guest.fetch(port, path)).partition(b"\r\n\r\n")[2].decode()

                assert await body("/args") == "".join(f"<{a}>" for a in NASTY)
                assert await body("/one") == '$(touch /owned) `id` it"s'
                assert await body("/two") == "from the VM $(touch /owned)\nend"
                assert await body("/pwd") == "/srv/deep\n"
                assert await body("/ada") == "ada\n"
                assert await body("/hosts") == "10.0.2.15\tnasty-1\n"
                log = guest.log()
                await guest.shut_down()
        assert "[nasty] boot of nasty-1" in log, log
        assert "OWNED" not in log


async def test_a_service_that_ends_is_told_and_started_again(tmp_path: Path) -> None:
    """An entrypoint that ends is reported with its status, and started again."""
    tmp_path.joinpath("Formfile").write_text('NAME fails\nFROM busybox\nMEMORY 192\nENTRYPOINT ["sh", "-c", "exit 7"]\n')
    image = await image_of(tmp_path, tmp_path / "images")
    with trio.fail_after(60):
        async with booted(tmp_path, image, CONFIG, await free_port()) as guest:
            assert await guest.line() == "failed the service ended with status 7", guest.log()
            assert await guest.line() == "failed the service ended with status 7", guest.log()
            await guest.send("status")
            assert await guest.line() == "starting"
            await guest.shut_down()


async def test_the_console_gives_a_shell_and_a_stubborn_service_ends(tmp_path: Path) -> None:
    """Enter on the console gives a root shell that knows ENV; a service that ignores TERM is killed after the grace."""
    tmp_path.joinpath("Formfile").write_text(
        "NAME stubborn\nFROM busybox\nMEMORY 192\nENV COLOUR='deep blue'\n"
        "ENTRYPOINT sh -c 'trap : TERM; while :; do sleep 1; done'\n"
    )
    image = await image_of(tmp_path, tmp_path / "images")
    with trio.fail_after(60):
        async with booted(tmp_path, image, CONFIG, await free_port()) as guest:
            assert await guest.line() == "ready", guest.log()
            await guest.type_line("", until="root@hello-1:~# ")
            await guest.type_line('echo "$(id -un) $COLOUR" $((6 * 7))', until="root deep blue 42")
            start_s = guest.elapsed_s()
            await guest.shut_down()
            assert 4 < guest.elapsed_s() - start_s < 15


async def test_scratch_needs_nothing_but_its_own_program(tmp_path: Path) -> None:
    """FROM scratch with one static program in it boots, and has nothing else in its root."""
    base = await trio.to_thread.run_sync(lambda: prepare_base(CACHE, report=print))
    entries = {entry.name: entry.data for entry in read_cpio(base.initramfs_path.read_bytes())}
    program = tmp_path / "busybox"
    program.write_bytes(entries["base/bin/busybox"])
    program.chmod(0o755)
    tmp_path.joinpath("Formfile").write_text(
        "NAME bare\nFROM scratch\nMEMORY 192\nCOPY busybox /busybox\nEXPOSE 80\nWORKDIR /srv\n"
        'ENTRYPOINT ["/busybox", "httpd", "-f", "-p", "80", "-h", "/etc"]\n'
    )
    image = await image_of(tmp_path, tmp_path / "images")
    port = await free_port()
    with trio.fail_after(60):
        async with booted(tmp_path, image, CONFIG, port) as guest:
            assert await guest.line() == "ready", guest.log()
            assert (await guest.fetch(port, "/hostname")).endswith(b"\r\n\r\nhello-1\n")
            assert b"404" in await guest.fetch(port, "/passwd")
            await guest.shut_down()


async def test_an_image_without_entrypoint_is_ready_and_may_ask_for_a_password(tmp_path: Path) -> None:
    """Without a service the guest is ready at once; with `disable_root` its console asks who is there."""
    tmp_path.joinpath("Formfile").write_text(
        "NAME idle\nFROM busybox\nMEMORY 192\nUSER username:ada passwd:secret disable_root:yes\n"
    )
    image = await image_of(tmp_path, tmp_path / "images")
    with trio.fail_after(60):
        async with booted(tmp_path, image, CONFIG, await free_port()) as guest:
            assert await guest.line() == "ready", guest.log()
            await guest.type_line("", until="login: ")
            await guest.type_line("ada", until="Password: ")
            await guest.type_line("secret", until="ada@hello-1:~$ ")
            await guest.shut_down()

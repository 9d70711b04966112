"""What every image stands on: a kernel and a busybox userland, made from Debian packages without installing any.

Theory of operation. `apt-get download` fetches the two packages (apt checks them against its signed index),
`dpkg-deb -x` unpacks them; both work without privileges. From the kernel package come the PVH ELF image (facts: one
file that QEMU and Cloud Hypervisor boot directly, in 0.8 s less than a bzImage) and the few modules a guest needs; from
busybox-static the userland. The result is kept in the cache directory, by a key of everything that went into it.

Rules: (1) the same packages give the same bytes on every machine; (2) two processes may ask at once: one builds, under
a file lock, the other waits; (3) a finished result appears by rename, so that half of one is never seen.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import structlog

from formation.core.codec import encode
from formation.core.errors import HostError
from formation.pack.blobs import digest_of_file
from formation.pack.cpio import CpioEntry, character_device, directory, regular_file, symbolic_link, with_parents, write_cpio
from formation.pack.plan import BASE_ETC_FILES
from formation.pack.vmlinux import extract_vmlinux

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
# Raised when the same packages shall give other bytes; the guest's init is part of the key by its content.
BASE_VERSION = 1
_BASE_FILES = ("vmlinux", "initramfs.cpio")
# Their digests as they were made, a JSON object by file name.
_SUMS_FILE = "sums.json"
# In the order of loading; dependencies are found in the modules themselves.
MODULES_FIRST = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "overlay")
# What the service does not wait for.
MODULES_LATER = ("virtio_rng", "virtio_balloon")
# Shipped in the base as they are, and part of its key.
GUEST_FILES = ("init", "mounts", "mounts.early")
# Debian's kernel is 27 MB; a mirror at 100 KB/s needs 270 s for it.
DOWNLOAD_TIMEOUT_S = 600
UNPACK_TIMEOUT_S = 120

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFiles:
    """Kernel and base initramfs in the cache, and what they were made from."""

    kernel_path: Path
    initramfs_path: Path
    sources: tuple[str, ...]
    """File names of the packages."""
    cached: bool


class PrepareBase(Protocol):
    """`prepare_base`, or what stands for it."""

    def __call__(self, cache_dir: Path, *, report: Callable[[str], None]) -> BaseFiles:
        """Make kernel and base initramfs, or find them."""
        ...


def prepare_base(cache_dir: Path, *, report: Callable[[str], None]) -> BaseFiles:
    """Make kernel and base initramfs, or find them in the cache. Blocks: run it in a thread.

    Args:
      cache_dir: made if missing; may be shared by all nodes and users of this machine who can write to it.
      report: told each slow step, for people.

    Raises:
      HostError: apt or dpkg is missing or refuses, no such package, the disk is full.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / "base.lock"):
            for left in (*cache_dir.glob("download-*"), *cache_dir.glob("base/building-*")):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: the lock is ours
            packages = _packages(cache_dir, report)
            key = _base_key(packages)
            place = cache_dir / "base" / key
            base = BaseFiles(
                kernel_path=place / "vmlinux",
                initramfs_path=place / "initramfs.cpio",
                sources=tuple(p.name for p in packages),
                cached=_is_whole(place),
            )
            if not base.cached:
                report("unpacking kernel and busybox")
                _build_base(packages, place)
            return base
    except OSError as exc:
        raise HostError(
            f"cannot prepare the base image in {cache_dir}: {exc}", hint="check that the disk has 200 MiB free and is writable"
        ) from exc


def find_base_file(cache_dir: Path, *, size_bytes: int) -> tuple[Path, ...]:
    """Kernels and base initramfs in the cache that have this size: what a peer's image needs may be among them."""
    try:
        return tuple(p for p in sorted((cache_dir / "base").glob("*/*")) if p.stat().st_size == size_bytes)
    except OSError:
        return ()


def _packages(cache_dir: Path, report: Callable[[str], None]) -> tuple[Path, Path]:
    """(kernel, busybox) package files; downloaded once. A newer kernel comes with a cleared cache."""
    folder = cache_dir / "packages"
    found = tuple(_only(folder.glob(pattern)) for pattern in ("linux-image-*.deb", "busybox-static_*.deb"))
    if found[0] and found[1]:
        return found[0], found[1]
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise HostError(
                f"{tool} is missing: images are made from Debian packages",
                hint=f"build on Debian or Ubuntu, or copy {folder} from a machine that has it",
            )
    report(f"downloading {KERNEL_PACKAGE} and {BUSYBOX_PACKAGE} (28 MB, once)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="download-") as name:
        temporary = Path(name)
        _run(["apt-get", "download", "-q", _kernel_package(), BUSYBOX_PACKAGE], cwd=temporary, timeout_s=DOWNLOAD_TIMEOUT_S)
        kernel, busybox = _only(temporary.glob("linux-image-*.deb")), _only(temporary.glob("busybox-static_*.deb"))
        if kernel is None or busybox is None:
            raise HostError("apt-get downloaded no kernel or no busybox", hint="run apt-get update, then try again")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        temporary.mkdir()  # TemporaryDirectory wants something to remove
    return folder / kernel.name, folder / busybox.name


def _kernel_package() -> str:
    """The package that the meta-package stands for today, such as `linux-image-6.1.0-56-cloud-amd64`."""
    shown = _run(["apt-cache", "show", "--no-all-versions", KERNEL_PACKAGE], timeout_s=60)
    match = re.search(r"^Depends:.*?\b(linux-image-[0-9][a-z0-9.+-]*-cloud-amd64)\b", shown, re.MULTILINE)
    if match is None:
        raise HostError(f"apt does not know what {KERNEL_PACKAGE} depends on", hint="run apt-get update, then try again")
    return match[1]


def _build_base(packages: tuple[Path, Path], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="building-") as name:
        tree, result = Path(name) / "tree", Path(name) / "result"
        tree.mkdir()
        result.mkdir()
        for package in packages:
            try:
                _run(["dpkg-deb", "-x", str(package), str(tree)], timeout_s=UNPACK_TIMEOUT_S)
            except HostError as exc:
                hint = f"is the disk full? else {package.name} is damaged: remove {package.parent}, it is downloaded anew"
                raise HostError(exc.message, hint=hint) from exc
        vmlinuz = _only((tree / "boot").glob("vmlinuz-*"))
        if vmlinuz is None:
            raise HostError(f"{packages[0].name} holds no kernel", hint="clear the cache directory, then try again")
        _write(result / "vmlinux", extract_vmlinux(vmlinuz.read_bytes()))
        _write(result / "initramfs.cpio", write_cpio(with_parents(_base_entries(tree))))
        sums = {path.name: digest_of_file(path) for path in sorted(result.iterdir())}
        _write(result / _SUMS_FILE, json.dumps(sums).encode())
        # A damaged one; whoever has its files linked or open keeps them.
        shutil.rmtree(place, ignore_errors=True)
        os.replace(result, place)
    log.info("base.built", place=str(place))


def _is_whole(place: Path) -> bool:
    """Whether a base is there as it was made. Read each time: every image after a damaged byte would carry it on."""
    try:
        sums = json.loads((place / _SUMS_FILE).read_bytes())
        return set(sums) == set(_BASE_FILES) and all(digest_of_file(place / name) == sums[name] for name in _BASE_FILES)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError) as exc:
        log.warning("base.unreadable", place=str(place), error=str(exc))
        return False


def _base_key(packages: tuple[Path, Path]) -> str:
    """16 hex digits of everything that the base is made from."""
    digest = hashlib.sha256(f"{BASE_VERSION} {MODULES_FIRST} {MODULES_LATER}".encode())
    digest.update(encode(dict(BASE_ETC_FILES)))
    for name in GUEST_FILES:
        digest.update(_guest_file(name))
    for package in packages:
        digest.update(hashlib.sha256(package.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _guest_file(name: str) -> bytes:
    return resources.files("formation.pack.guest").joinpath(name).read_bytes()


# ---- the base initramfs


def _base_entries(tree: Path) -> Iterator[CpioEntry]:
    for name in ("dev", "proc", "sys", "disk", "newroot", "run/formation", "run/lock", "image"):
        yield directory(name)
    yield directory("formation", 0o700)
    # The kernel opens it for PID 1 before anything is mounted.
    yield character_device("dev/console", 5, 1)
    yield regular_file("init", _guest_file("init"), 0o755)
    yield regular_file("formation/mounts.early", _guest_file("mounts.early"))
    yield regular_file("formation/mounts", _guest_file("mounts"))
    for name in ("log", "never"):
        yield CpioEntry(name=f"formation/{name}", mode=stat.S_IFIFO | 0o600)
    yield from _module_entries(tree)
    yield from _userland_entries(tree)


def _userland_entries(tree: Path) -> Iterator[CpioEntry]:
    """`/base`: busybox with its applets, and the few files in /etc that programs expect."""
    for name in ("dev", "proc", "sys", "run", "mnt", "home", "var/log", "usr/local/bin"):
        yield directory(f"base/{name}")
    yield directory("base/root", 0o700)
    yield directory("base/tmp", 0o1777)
    yield symbolic_link("base/var/run", "../run")
    busybox = tree / "bin" / "busybox"
    if not busybox.is_file():
        busybox = tree / "usr" / "bin" / "busybox"
    yield regular_file("base/bin/busybox", busybox.read_bytes(), 0o755)
    # Running the package's own busybox is how it tells which applets it has; it is static and signed by Debian.
    for path in sorted(set(_run([str(busybox), "--list-full"], timeout_s=60).split())):
        if path != "bin/busybox":
            yield symbolic_link(f"base/{path}", "../" * path.count("/") + "bin/busybox")
    for name, text in BASE_ETC_FILES.items():
        yield regular_file(f"base/etc/{name}", text.encode(), 0o600 if name == "shadow" else 0o644)


def _module_entries(tree: Path) -> Iterator[CpioEntry]:
    """The modules, with the `modules.dep` by which busybox's modprobe loads them all in one process."""
    folder = next((d for d in (tree / "lib/modules", tree / "usr/lib/modules") if d.is_dir()), None)
    release = _only(folder.iterdir()) if folder else None
    if release is None:
        raise HostError("the kernel package holds no modules", hint="clear the cache directory, then try again")
    path_of = {p.name.removesuffix(".ko").replace("-", "_"): p for p in sorted(release.rglob("*.ko"))}
    depends: dict[str, tuple[str, ...]] = {}
    for name in (*MODULES_FIRST, *MODULES_LATER):
        _collect_module(name, path_of, depends)
    lines = []
    for name, needs in depends.items():
        yield regular_file(f"lib/modules/{release.name}/{name}.ko", path_of[name].read_bytes())
        # modprobe wants every dependency, the nearest first.
        lines.append(f"{name}.ko:{''.join(f' {need}.ko' for need in reversed(_all_needs(needs, depends)))}\n")
    yield regular_file(f"lib/modules/{release.name}/modules.dep", "".join(lines).encode())
    for file, wanted in (("first", MODULES_FIRST), ("later", MODULES_LATER)):
        yield regular_file(f"lib/modules/{file}", (" ".join(name for name in wanted if name in depends) + "\n").encode())


def _collect_module(name: str, path_of: dict[str, Path], depends: dict[str, tuple[str, ...]]) -> None:
    """Add a module after everything it needs. One that is not there is built into the kernel."""
    if name in depends or name not in path_of:
        return
    needs = tuple(n for n in module_depends(path_of[name].read_bytes()) if n in path_of)
    for need in needs:
        _collect_module(need, path_of, depends)
    depends[name] = needs


def _all_needs(needs: Iterable[str], depends: dict[str, tuple[str, ...]]) -> list[str]:
    ordered: list[str] = []
    for need in needs:
        for each in (*_all_needs(depends[need], depends), need):
            if each not in ordered:
                ordered.append(each)
    return ordered


def module_depends(module: bytes) -> tuple[str, ...]:
    """What a kernel module needs, by the `depends=` of its .modinfo section."""
    match = re.search(rb"(?:^|\0)depends=([A-Za-z0-9_,-]*)\0", module)
    return tuple(n.replace("-", "_") for n in match[1].decode().split(",") if n) if match else ()


# ---- files and processes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _only(paths: Iterable[Path]) -> Path | None:
    return next(iter(sorted(paths)), None)


def _run(command: list[str], *, timeout_s: float, cwd: Path | None = None) -> str:
    """Standard output of a command that needs no shell, no terminal and no particular language."""
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "HOME": os.environ.get("HOME", "/")}
    environment |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy") or k == "APT_CONFIG"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HostError(f"{command[0]} could not run: {exc}", hint="install apt and dpkg, or build on Debian") from exc
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        hint = (
            "run apt-get update as root, then try again" if "apt" in command[0] else "clear the cache directory, then try again"
        )
        raise HostError(f"{' '.join(command[:2])} failed: {said[-1] if said else f'status {done.returncode}'}", hint=hint)
    return done.stdout.decode("utf-8", "replace")

"""From a Formfile and the files of its context to the image's own layer: pure, so that it is the same everywhere.

The layer is a cpio archive of `/image` (the files) and `/formation/image` (what the guest's init reads, see
`formation/pack/guest`). Owner, time and order are fixed; of a file's mode only "may be executed" counts.
"""

from __future__ import annotations

import hashlib
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from formation.core.codec import encode
from formation.core.errors import UsageError
from formation.core.ids import Digest, digest_of
from formation.core.units import MIB, format_size
from formation.pack.cpio import CpioEntry, directory, regular_file, symbolic_link, with_parents, write_cpio
from formation.pack.formfile import Copy, Formfile, Install, Run
from formation.pack.guest import encode_expose, encode_list
from formation.pack.manifest import ImageConfig, UserAccount

# Raised when the same input shall give other bytes.
PLAN_VERSION = 1
# A layer is unpacked into the guest's memory; larger ones come with disk layers, in a later version.
LAYER_SIZE_MAX_BYTES = 256 * MIB
# What kernel and base take of the guest's memory (measured: 90 MiB used right after boot).
GUEST_RESERVE_MIB = 96
BASES = ("busybox", "scratch")
_LOWER = {"busybox": "/image:/base", "scratch": "/image"}
# First id of users made by USER; the convention of Debian.
_UID_FIRST = 1000

BASE_ETC_FILES: Mapping[str, str] = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "group": "root:x:0:\ntty:x:5:\nsudo:x:27:\nnogroup:x:65534:\n",
    # Locked: the console gives a root shell by itself, and nothing else lets root in.
    "shadow": "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n",
    "profile": 'for file in /etc/profile.d/*.sh; do [ ! -r "$file" ] || . "$file"; done\nunset file\nPS1=\'\\u@\\h:\\w\\$ \'\n',
    "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    "shells": "/bin/sh\n/bin/ash\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFile:
    """A file, directory or symbolic link of the build context; `path` is relative and normal."""

    path: str
    kind: str
    """`file`, `directory` or `link`."""
    executable: bool = False
    data: bytes = b""
    """Content of a file, target of a link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What a build makes."""

    config: ImageConfig
    base: str
    copies: tuple[Copy, ...]


def plan_build(formfile: Formfile, *, name: str | None = None) -> BuildPlan:
    """What to build for a Formfile; `name` overrides its NAME.

    Raises:
      UsageError: it asks for what this version can not build; names file, line and column.
    """
    if formfile.base not in BASES:
        raise formfile.base_place.error(
            f"FROM {formfile.base} comes with a later version", hint=f"use FROM {' or FROM '.join(BASES)}"
        )
    for step in formfile.steps:
        match step:
            case Run():
                raise step.place.error(
                    "RUN comes with a later version", hint="do it at the start of the service, in the ENTRYPOINT's program"
                )
            case Install():
                raise step.place.error(
                    "INSTALL comes with a later version", hint="COPY a static program into the image instead"
                )
    if formfile.gpu is not None:
        raise formfile.gpu.place.error("GPU comes with a later version", hint="remove the line")
    for variable, place in zip(formfile.env, formfile.env_places, strict=True):
        kind, _, service = variable.scope.partition(":")
        if kind == "service" and service != formfile.name:
            raise place.error(
                f"expected service:{formfile.name}, the only service of this image", hint="the service has the image's NAME"
            )
    config = ImageConfig(
        name=name or formfile.name,
        description=formfile.description,
        vcpus=formfile.vcpus,
        memory_mib=formfile.memory_mib,
        disk_gib=formfile.disk_gib,
        entrypoint=formfile.entrypoint,
        workdir=formfile.workdir,
        env=formfile.env,
        users=formfile.users,
        expose=formfile.expose,
        disable_root=formfile.disable_root,
    )
    return BuildPlan(config=config, base=formfile.base, copies=tuple(s for s in formfile.steps if isinstance(s, Copy)))


def is_wanted(plan: BuildPlan, path: str) -> bool:
    """Whether a COPY takes this path of the context."""
    return any(copy.source in (".", path) or path.startswith(copy.source + "/") for copy in plan.copies)


def build_layer(plan: BuildPlan, files: Sequence[ContextFile]) -> bytes:
    """The layer's archive.

    Args:
      plan: what to build.
      files: the wanted part of the context, sorted by path.

    Raises:
      UsageError: a COPY finds nothing, a file stands where a directory must be, or the layer is too large.
    """
    copied: dict[str, CpioEntry] = {}
    for copy in plan.copies:
        for entry in _copied(copy, files):
            _put(copied, entry, copy)
    image = {**copied, **{e.name: e for e in _made_entries(plan, copied)}}
    entries = [*with_parents(image.values()), *with_parents(_config_entries(plan))]
    size_bytes = sum(len(entry.data) for entry in entries)
    if size_bytes > LAYER_SIZE_MAX_BYTES:
        raise UsageError(
            f"the image's files make {format_size(size_bytes)}, the limit is {format_size(LAYER_SIZE_MAX_BYTES)}",
            hint="list what is not needed in .formignore",
        )
    need_mib = GUEST_RESERVE_MIB + 2 * size_bytes // MIB
    if need_mib > plan.config.memory_mib:
        raise UsageError(
            f"the image's files need a guest of {need_mib} MiB, MEMORY is {plan.config.memory_mib}",
            hint=f"write MEMORY {need_mib}",
        )
    return write_cpio(entries)


def plan_digest(plan: BuildPlan, files: Sequence[ContextFile], *, base_digests: Iterable[str]) -> Digest:
    """Digest of everything that the image is made from."""
    listed = [[f.path, f.kind, f.executable, hashlib.sha256(f.data).digest()] for f in files]
    copies = [[c.source, c.target, c.into_directory] for c in plan.copies]
    return digest_of(encode([PLAN_VERSION, plan.config, plan.base, copies, listed, list(base_digests)]))


def _copied(copy: Copy, files: Sequence[ContextFile]) -> Iterator[CpioEntry]:
    """The entries of one COPY. A directory's content goes into the target; a file becomes it, or goes into it."""
    whole = copy.source == "."
    own = None if whole else next((f for f in files if f.path == copy.source), None)
    if own is None and not whole:
        raise copy.place.error(
            f"expected {copy.source!r} in the build context, found none",
            hint="it is relative to the Formfile; does .formignore hide it?",
        )
    target = copy.target.strip("/")
    if own is not None and own.kind != "directory":
        name = f"{target}/{own.path.rpartition('/')[2]}" if copy.into_directory or not target else target
        yield _entry(own, name.strip("/"))
        return
    if target:
        yield directory(f"image/{target}")
    prefix = "" if whole else copy.source + "/"
    for file in files:
        if file.path.startswith(prefix):
            yield _entry(file, f"{target}/{file.path[len(prefix) :]}".strip("/"))


def _entry(file: ContextFile, name: str) -> CpioEntry:
    match file.kind:
        case "directory":
            return directory(f"image/{name}")
        case "link":
            return symbolic_link(f"image/{name}", file.data.decode())
    return regular_file(f"image/{name}", file.data, 0o755 if file.executable else 0o644)


def _put(entries: dict[str, CpioEntry], entry: CpioEntry, copy: Copy) -> None:
    """Add an entry; a later COPY replaces a file, but never a file by a directory or the other way round."""
    parts = entry.name.split("/")
    for depth in range(2, len(parts)):
        above = entries.get("/".join(parts[:depth]))
        if above is not None and not stat.S_ISDIR(above.mode):
            raise _clash(copy, above.name)
        entries.setdefault("/".join(parts[:depth]), directory("/".join(parts[:depth])))
    before = entries.get(entry.name)
    if before is not None and stat.S_ISDIR(before.mode) != stat.S_ISDIR(entry.mode):
        raise _clash(copy, entry.name)
    entries[entry.name] = entry


def _clash(copy: Copy, name: str) -> UsageError:
    path = name.removeprefix("image")
    return copy.place.error(
        f"expected {path} to be a file or a directory, not both", hint="end the target with / to copy into a directory"
    )


# ---- what the builder adds


def _made_entries(plan: BuildPlan, copied: Mapping[str, CpioEntry]) -> Iterator[CpioEntry]:
    """Mount points, the working directory, and what USER and ENV stand for."""
    for name in ("dev", "proc", "sys", "run", "etc", "tmp"):
        if f"image/{name}" not in copied:
            yield directory(f"image/{name}", 0o1777 if name == "tmp" else 0o755)
    workdir = "image" + plan.config.workdir.rstrip("/")
    if workdir != "image" and workdir not in copied:
        yield directory(workdir)
    system = [variable for variable in plan.config.env if variable.scope == "system"]
    if system:
        yield regular_file("image/etc/profile.d/formation.sh", _exports((v.key, v.value) for v in system))
    if plan.config.users:
        yield from _user_entries(plan, copied)
    root = [v for v in plan.config.env if v.scope == "user:root"]
    if root and not any(user.name == "root" for user in plan.config.users):
        yield regular_file("image/root/.profile", _exports((v.key, v.value) for v in root))


def _exports(variables: Iterable[tuple[str, str]]) -> bytes:
    """Lines for a login shell in the guest; keys are identifiers, values are quoted."""
    return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in variables).encode()


def _user_entries(plan: BuildPlan, copied: Mapping[str, CpioEntry]) -> Iterator[CpioEntry]:
    tables = {name: _table(name, copied) for name in ("passwd", "group", "shadow")}
    uid = max((int(row[2]) for row in tables["passwd"].values() if _UID_FIRST <= int(row[2]) < 60000), default=_UID_FIRST - 1)
    for user in plan.config.users:
        if user.name not in tables["passwd"]:
            uid += 1
        yield from _one_user(plan, user, uid, tables)
    for name, rows in tables.items():
        text = "".join(":".join(row) + "\n" for row in rows.values())
        yield regular_file(f"image/etc/{name}", text.encode(), 0o600 if name == "shadow" else 0o644)


def _one_user(plan: BuildPlan, user: UserAccount, uid: int, tables: dict[str, dict[str, list[str]]]) -> Iterator[CpioEntry]:
    passwd, group, shadow = tables["passwd"], tables["group"], tables["shadow"]
    known = passwd.get(user.name)
    number, home = (known[2], known[5]) if known else (str(uid), f"/home/{user.name}")
    passwd[user.name] = [user.name, "x", number, known[3] if known else number, user.name, home, user.shell]
    if not known:
        group.setdefault(user.name, [user.name, "x", number, ""])
    locked = "!" if user.lock_password else ""
    # Day 0 of the last change makes login ask for a new password.
    shadow[user.name] = [
        user.name,
        locked + (user.password_hash or ("*" if not locked else "")),
        "0" if user.password_expired else "19000",
        "0",
        "99999",
        "7",
        "",
        "",
        "",
    ]
    for name in (*user.groups, *(["sudo"] if user.sudo else [])):
        row = group.setdefault(name, [name, "x", _free_gid(group), ""])
        members = [m for m in row[3].split(",") if m]
        row[3] = ",".join(dict.fromkeys([*members, user.name]))
    owner_id = int(number)
    yield directory(f"image{home}", 0o700, owner_id=owner_id)
    own = [(v.key, v.value) for v in plan.config.env if v.scope == f"user:{user.name}"]
    if own:
        yield regular_file(f"image{home}/.profile", _exports(own), owner_id=owner_id)
    if user.ssh_authorized_keys:
        keys = "".join(f"{key}\n" for key in user.ssh_authorized_keys).encode()
        yield directory(f"image{home}/.ssh", 0o700, owner_id=owner_id)
        yield regular_file(f"image{home}/.ssh/authorized_keys", keys, 0o600, owner_id=owner_id)
    if user.sudo:
        yield regular_file(f"image/etc/sudoers.d/{user.name}", f"{user.name} ALL=(ALL) NOPASSWD:ALL\n".encode(), 0o440)


def _free_gid(group: Mapping[str, Sequence[str]]) -> str:
    taken = {row[2] for row in group.values()}
    return next(str(gid) for gid in range(_UID_FIRST + 1000, 60000) if str(gid) not in taken)


_COLUMNS = {"passwd": 7, "group": 4, "shadow": 9}


def _table(name: str, copied: Mapping[str, CpioEntry]) -> dict[str, list[str]]:
    """Rows of the /etc file that the image brings, else of the base's, by their first column."""
    entry = copied.get(f"image/etc/{name}")
    text = entry.data.decode("utf-8", "replace") if entry is not None else BASE_ETC_FILES[name]
    rows = [line.split(":") for line in text.splitlines() if line.strip()]
    for row in rows:
        if len(row) != _COLUMNS[name] or (name != "shadow" and not row[2].isdigit()):
            raise UsageError(
                f"/etc/{name}: {':'.join(row)[:40]!r} is not a row of it", hint="mend the file that COPY brings, or remove USER"
            )
    return {row[0]: row for row in rows}


def _config_entries(plan: BuildPlan) -> Iterator[CpioEntry]:
    config = plan.config
    service_env = [v for v in config.env if v.scope == "system" or v.scope.startswith("service:")]
    yield directory("formation", 0o700)
    values = {
        "name": config.name.encode() + b"\n",
        "lower": _LOWER[plan.base].encode() + b"\n",
        "entrypoint": encode_list(config.entrypoint),
        "env": encode_list([f"{v.key}={v.value}" for v in service_env]),
        "workdir": encode_list([config.workdir]),
        "expose": encode_expose(config.expose),
    }
    if config.disable_root:
        values["disable_root"] = b""
    for name, data in values.items():
        yield regular_file(f"formation/image/{name}", data, 0o600)

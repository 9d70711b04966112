"""The Formfile: what an image is made of, written by people. Strict: nothing is ignored silently.

Grammar: one directive a line; a line whose first character (after blanks) is `#` is a comment. Every mistake is a
UsageError `path:line:column: what was expected` with a hint. What the builder can not do yet is parsed all the same,
with its place, so that the builder can point at it (`plan.py`).

Rules: (1) pure: no file, no clock; (2) a password is hashed here and its clear text goes no further.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from formation.core.errors import UsageError
from formation.core.ids import check_label
from formation.core.spec import DISK_GIB_MAX, MEMORY_MIB_MAX, MEMORY_MIB_MIN, VCPUS_MAX
from formation.core.units import KIB
from formation.pack.formfile_checks import (
    USERNAME,
    absolute_path,
    check_limit,
    context_path,
    env_scope,
    json_words,
    one_word,
    only_word,
    refuse_continuation,
    whole_number,
)
from formation.pack.formfile_directives import ALIASES, SINGLE_VALUED, WANTS, example, suggest, unknown_directive
from formation.pack.formfile_text import Line, Place, Word, quoted_words
from formation.pack.formfile_user import USER_FIELDS, check_user, finish_user, read_flag
from formation.pack.manifest import (
    ENTRYPOINT_COUNT_MAX,
    ENV_COUNT_MAX,
    EXPOSE_COUNT_MAX,
    USER_COUNT_MAX,
    EnvVar,
    ExposedPort,
    UserAccount,
)

# A Formfile is read by people: the longest that we know of has 300 lines.
FORMFILE_SIZE_MAX_BYTES = 256 * KIB
# Room for a long RUN; a line beyond it is a file in the wrong format.
LINE_LENGTH_MAX = 8192
DESCRIPTION_LENGTH_MAX = 1024

VCPUS_DEFAULT = 1
MEMORY_MIB_DEFAULT = 512
DISK_GIB_DEFAULT = 1
GPU_COUNT_MAX = 8

_WORD = re.compile(r"\S+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u0085\u2028\u2029\ud800-\udfff]")
_IMAGE_REFERENCE = re.compile(r"^[a-z0-9][A-Za-z0-9._/@:-]{0,254}$")
_PACKAGE = re.compile(r"^[a-z0-9][a-z0-9+.-]{0,99}(=[A-Za-z0-9.+:~-]{1,99})?$")
_ENV_KEY = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
_GPU = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?::([0-9]{1,2}))?$")
_PORT = re.compile(r"^([0-9]{1,5})(?:/(tcp|udp))?$")
# Where the guest keeps what is not the image's.
_RESERVED = ("/proc", "/sys", "/dev", "/run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A shell command that runs inside the image being built."""

    place: Place
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """Distribution packages."""

    place: Place
    packages: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Files of the context into the image. `source` is relative and normal, `.` for the whole context."""

    place: Place
    source: str
    target: str
    """Absolute and normal."""
    into_directory: bool
    """The target was written with a slash at its end: a file keeps its name inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Wanted graphics processors."""

    place: Place
    model: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Formfile:
    """A Formfile without mistakes."""

    path: str
    name: str
    description: str
    base: str
    base_place: Place
    steps: tuple[Run | Install | Copy, ...]
    env: tuple[EnvVar, ...]
    env_places: tuple[Place, ...]
    """Where each of `env` stands."""
    users: tuple[UserAccount, ...]
    disable_root: bool
    vcpus: int
    memory_mib: int
    disk_gib: int
    gpu: Gpu | None
    workdir: str
    expose: tuple[ExposedPort, ...]
    entrypoint: tuple[str, ...]


def decode_formfile(data: bytes, *, path: str) -> str:
    """The text of a Formfile's bytes.

    Raises:
      UsageError: too large, or not UTF-8.
    """
    if len(data) > FORMFILE_SIZE_MAX_BYTES:
        raise UsageError(
            f"{path}:1:1: expected at most {FORMFILE_SIZE_MAX_BYTES} bytes, found {len(data)}", hint="is this a Formfile?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        before = data[: exc.start]
        place = Place(
            path=path, line=before.count(b"\n") + 1, column=len(before.rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
        )
        raise place.error("expected UTF-8 text", hint="save the file as UTF-8") from exc


def parse_formfile(text: str, *, path: str) -> Formfile:
    """The Formfile in a text; `path` is for messages only.

    Raises:
      UsageError: `path:line:column: what was expected`, with a hint.
    """
    if len(text) > FORMFILE_SIZE_MAX_BYTES:
        raise UsageError(
            f"{path}:1:1: expected at most {FORMFILE_SIZE_MAX_BYTES} bytes, found more", hint="is this a Formfile?"
        )
    draft = _Draft(path)
    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        line = _line(Place(path=path, line=number, column=1), raw.removesuffix("\r"))
        if line is not None:
            draft.add(line)
    return draft.finish()


def _line(start: Place, raw: str) -> Line | None:
    if len(raw) > LINE_LENGTH_MAX:
        raise start.at(LINE_LENGTH_MAX + 1).error(
            f"expected the line to end within {LINE_LENGTH_MAX} characters", hint="is this a Formfile?"
        )
    bad = _CONTROL.search(raw)
    if bad is not None:
        raise start.at(bad.start() + 1).error(
            "expected text, found a control character", hint="remove it, or write it as an escape"
        )
    first = _WORD.search(raw)
    if first is None or first[0].startswith("#"):
        return None
    rest = raw[first.end() :]
    blank = len(rest) - len(rest.lstrip())
    return Line(
        directive=Word(text=first[0], place=start.at(first.start() + 1)),
        rest=rest.strip(),
        rest_place=start.at(first.end() + blank + 1 if rest.strip() else first.end() + 1),
    )


@dataclass(slots=True)
class _PendingUser:
    """A user whose password waits for the image's name (its salt)."""

    place: Place
    values: dict[str, Word]


@dataclass(slots=True)
class _Draft:
    """What has been read so far. One method a directive, found by its name."""

    path: str
    seen: dict[str, Word] = field(default_factory=dict)
    name: str = ""
    description: str = ""
    base: Word | None = None
    steps: list[Run | Install | Copy] = field(default_factory=list)
    copies: list[tuple[Place, Word, Word]] = field(default_factory=list)
    env: list[EnvVar] = field(default_factory=list)
    env_places: list[Place] = field(default_factory=list)
    users: dict[str, _PendingUser] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    gpu: Gpu | None = None
    workdir: str = "/"
    expose: dict[ExposedPort, Place] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()

    def add(self, line: Line) -> None:
        written = line.directive.text
        directive = ALIASES.get(written, written)
        handler = _HANDLERS.get(directive)
        if handler is None:
            raise unknown_directive(line.directive)
        if directive in SINGLE_VALUED:
            first = self.seen.get(directive)
            if first is not None:
                also = f" (as {first.text})" if first.text != written else ""
                raise line.directive.place.error(
                    f"expected {written} at most once; line {first.place.line} has it already{also}",
                    hint="remove one of the two",
                )
        self.seen.setdefault(directive, line.directive)
        if not line.rest:
            raise line.rest_place.error(f"expected {WANTS[directive]} after {written}", hint=example(directive))
        handler(self, line)

    def finish(self) -> Formfile:
        start = Place(path=self.path, line=1, column=1)
        for directive in ("NAME", "FROM"):
            if directive not in self.seen:
                raise start.error(f"expected a {directive} directive, found none", hint=example(directive))
        assert self.base is not None
        users = tuple(finish_user(self.name, pending.values) for pending in self.users.values())
        names = {user.name for user in users} | {"root"}
        for variable, place in zip(self.env, self.env_places, strict=True):
            kind, _, name = variable.scope.partition(":")
            if kind == "user" and name not in names:
                raise place.error(f"expected a USER named {name!r} for this scope", hint=f"add: USER username:{name}")
        return Formfile(
            path=self.path,
            name=self.name,
            description=self.description,
            base=self.base.text,
            base_place=self.base.place,
            steps=tuple(self.steps),
            env=tuple(self.env),
            env_places=tuple(self.env_places),
            users=users,
            disable_root=any(read_flag(p.values.get("disable_root"), default=False) for p in self.users.values()),
            vcpus=self.numbers.get("VCPU", VCPUS_DEFAULT),
            memory_mib=self.numbers.get("MEMORY", MEMORY_MIB_DEFAULT),
            disk_gib=self.numbers.get("DISK", DISK_GIB_DEFAULT),
            gpu=self.gpu,
            workdir=self.workdir,
            expose=tuple(self.expose),
            entrypoint=self.entrypoint,
        )

    def on_name(self, line: Line) -> None:
        word = one_word(line)
        try:
            self.name = check_label(word.text, what="NAME")
        except UsageError as exc:
            raise word.place.error(f"expected a name, found {word.text[:80]!r}", hint=exc.hint) from exc

    def on_description(self, line: Line) -> None:
        if len(line.rest) > DESCRIPTION_LENGTH_MAX:
            raise line.rest_place.error(
                f"expected at most {DESCRIPTION_LENGTH_MAX} characters", hint="put the long text into a file"
            )
        self.description = line.rest

    def on_from(self, line: Line) -> None:
        word = one_word(line)
        if not _IMAGE_REFERENCE.match(word.text):
            raise word.place.error(f"expected an image reference, found {word.text[:80]!r}", hint=example("FROM"))
        self.base = word

    def on_run(self, line: Line) -> None:
        refuse_continuation(line)
        self.steps.append(Run(place=line.directive.place, command=line.rest))

    def on_install(self, line: Line) -> None:
        words = line.words()
        for word in words:
            if not _PACKAGE.match(word.text):
                raise word.place.error(f"expected a package name, found {word.text[:80]!r}", hint=example("INSTALL"))
        self.steps.append(Install(place=line.directive.place, packages=tuple(w.text for w in words)))

    def on_copy(self, line: Line) -> None:
        words = line.quoted_words()
        if len(words) != 2:
            place = words[2].place if len(words) > 2 else line.rest_place.at(line.rest_place.column + len(line.rest))
            raise place.error(
                f"expected a source and a target, found {len(words)} words",
                hint="quote a path that has blanks: COPY 'my site' /www",
            )
        source, target = words
        copied = Copy(
            place=source.place,
            source=context_path(source),
            target=absolute_path(target, "COPY's target"),
            into_directory=target.text.endswith("/"),
        )
        if any(copied.target == reserved or copied.target.startswith(reserved + "/") for reserved in _RESERVED):
            raise target.place.error(
                f"expected a target outside {', '.join(_RESERVED)}", hint="these are made anew at each boot"
            )
        self.steps.append(copied)

    def on_env(self, line: Line) -> None:
        rest, place, scope = line.rest, line.rest_place, "system"
        if rest.startswith("--"):
            option, _, after = rest.partition(" ")
            scope = env_scope(Word(text=option, place=place))
            place = place.at(place.column + len(rest) - len(after.lstrip()))
            rest = after.lstrip()
        key, equals, value = rest.partition("=")
        if not equals:
            raise place.error("expected KEY=value", hint=example("ENV"))
        if not _ENV_KEY.match(key):
            raise place.error(
                f"expected a variable's name, found {key[:80]!r}", hint="use letters, digits and _, not starting with a digit"
            )
        words = quoted_words(value, place.at(place.column + len(key) + 1))
        if len(words) > 1 or value[:1].isspace():
            at = words[1].place if len(words) > 1 else place.at(place.column + len(key) + 1)
            raise at.error("expected the value to end here", hint=f"quote a value that has blanks: ENV {key}='…'")
        variable = EnvVar(scope, key, words[0].text if words else "")
        for other, where in zip(self.env, self.env_places, strict=True):
            if (other.scope, other.key) == (scope, key):
                raise place.error(
                    f"expected {key} once in scope {scope}; line {where.line} has it already", hint="remove one of the two"
                )
        check_limit(place, "ENV", len(self.env), ENV_COUNT_MAX)
        self.env.append(variable)
        self.env_places.append(place)

    def on_user(self, line: Line) -> None:
        values: dict[str, Word] = {}
        for word in line.quoted_words():
            separator = re.search(r"[:=]", word.text)
            if separator is None:
                raise word.place.error("expected field:value", hint=example("USER"))
            name, value = word.text[: separator.start()], word.text[separator.end() :]
            if name not in USER_FIELDS:
                raise word.place.error(f"expected a field of USER, found {name[:40]!r}", hint=suggest(name, USER_FIELDS))
            if name in values:
                raise word.place.error(f"expected {name} once in a USER", hint="separate several values by commas")
            values[name] = Word(text=value, place=word.place)
        username = values.get("username")
        if username is None:
            raise line.rest_place.error("expected a username in USER", hint=example("USER"))
        if not USERNAME.match(username.text):
            raise username.place.error(
                f"expected a username, found {username.text[:40]!r}",
                hint="use a-z, 0-9, _ and -, up to 32, not starting with a digit",
            )
        if username.text in self.users:
            first = self.users[username.text].place.line
            raise username.place.error(
                f"expected {username.text} once; line {first} has it already", hint="put all fields on one line"
            )
        check_limit(line.directive.place, "USER", len(self.users), USER_COUNT_MAX)
        self.users[username.text] = _PendingUser(line.directive.place, values)
        # Checked here, in the order of lines; hashed at the end, when the image's name is known.
        check_user(values)

    def on_vcpu(self, line: Line) -> None:
        self.numbers["VCPU"] = whole_number(line, 1, VCPUS_MAX, "vCPUs")

    def on_memory(self, line: Line) -> None:
        self.numbers["MEMORY"] = whole_number(line, MEMORY_MIB_MIN, MEMORY_MIB_MAX, "MiB")

    def on_disk(self, line: Line) -> None:
        self.numbers["DISK"] = whole_number(line, 1, DISK_GIB_MAX, "GiB")

    def on_gpu(self, line: Line) -> None:
        word = one_word(line)
        match = _GPU.match(word.text)
        count = int(match[2] or "1") if match else 0
        if match is None or count not in range(1, GPU_COUNT_MAX + 1):
            raise word.place.error(
                f"expected MODEL or MODEL:COUNT with 1 to {GPU_COUNT_MAX}, found {word.text[:80]!r}", hint=example("GPU")
            )
        self.gpu = Gpu(place=line.directive.place, model=match[1], count=count)

    def on_workdir(self, line: Line) -> None:
        words = line.quoted_words()
        self.workdir = absolute_path(only_word(words, line), "WORKDIR")

    def on_expose(self, line: Line) -> None:
        for word in line.words():
            match = _PORT.match(word.text)
            if match is None or int(match[1]) not in range(1, 65536):
                raise word.place.error(
                    f"expected a port from 1 to 65535, with /tcp or /udp, found {word.text[:40]!r}", hint=example("EXPOSE")
                )
            port: ExposedPort = (int(match[1]), "udp" if match[2] == "udp" else "tcp")
            if port in self.expose:
                raise word.place.error(
                    f"expected each port once; line {self.expose[port].line} has {port[0]}/{port[1]} already",
                    hint="remove one of the two",
                )
            check_limit(word.place, "EXPOSE", len(self.expose), EXPOSE_COUNT_MAX)
            self.expose[port] = word.place

    def on_entrypoint(self, line: Line) -> None:
        words = json_words(line) if line.rest.startswith("[") else line.quoted_words()
        if not words or not words[0].text:
            raise line.rest_place.error("expected a program", hint=example("ENTRYPOINT"))
        if "=" in words[0].text:
            raise words[0].place.error(
                "expected a program, found a variable", hint="set variables with ENV --scope=service:NAME KEY=value"
            )
        check_limit(line.rest_place, "ENTRYPOINT", len(words) - 1, ENTRYPOINT_COUNT_MAX)
        self.entrypoint = tuple(word.text for word in words)


_HANDLERS: dict[str, Callable[[_Draft, Line], None]] = {
    "NAME": _Draft.on_name,
    "DESCRIPTION": _Draft.on_description,
    "FROM": _Draft.on_from,
    "RUN": _Draft.on_run,
    "COPY": _Draft.on_copy,
    "INSTALL": _Draft.on_install,
    "ENV": _Draft.on_env,
    "USER": _Draft.on_user,
    "VCPU": _Draft.on_vcpu,
    "MEMORY": _Draft.on_memory,
    "DISK": _Draft.on_disk,
    "GPU": _Draft.on_gpu,
    "WORKDIR": _Draft.on_workdir,
    "EXPOSE": _Draft.on_expose,
    "ENTRYPOINT": _Draft.on_entrypoint,
}
assert set(_HANDLERS) == set(WANTS)

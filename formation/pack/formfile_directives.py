"""The directives of a Formfile: their names, and what to say about them."""

from __future__ import annotations

import difflib

from formation.core.errors import UsageError
from formation.pack.formfile_text import Word

ALIASES = {"CPU": "VCPU", "CORES": "VCPU", "MEM": "MEMORY", "MBS": "MEMORY", "STORAGE": "DISK"}
SINGLE_VALUED = frozenset({"NAME", "DESCRIPTION", "FROM", "VCPU", "MEMORY", "DISK", "GPU", "WORKDIR", "ENTRYPOINT"})
WANTS = {
    "NAME": "a name",
    "DESCRIPTION": "a text",
    "FROM": "an image reference",
    "RUN": "a shell command",
    "COPY": "a source and a target",
    "INSTALL": "package names",
    "ENV": "KEY=value",
    "USER": "field:value",
    "VCPU": "a number of vCPUs",
    "MEMORY": "a number of MiB",
    "DISK": "a number of GiB",
    "GPU": "a model",
    "WORKDIR": "an absolute path",
    "EXPOSE": "ports",
    "ENTRYPOINT": "a program",
}
_EXAMPLES = {
    "NAME": "NAME hello",
    "DESCRIPTION": "DESCRIPTION a small web page",
    "FROM": "FROM busybox",
    "RUN": "RUN make -C /src install",
    "COPY": "COPY www /www",
    "INSTALL": "INSTALL nginx-light curl",
    "ENV": "ENV --scope=system GREETING='good day'",
    "USER": "USER username:ada shell:/bin/sh groups:sudo",
    "VCPU": "VCPU 2",
    "MEMORY": "MEMORY 512",
    "DISK": "DISK 5",
    "GPU": "GPU A100:2",
    "WORKDIR": "WORKDIR /srv",
    "EXPOSE": "EXPOSE 80/tcp 53/udp",
    "ENTRYPOINT": 'ENTRYPOINT ["httpd", "-f", "-p", "80"]',
}
DIRECTIVES = (*WANTS, *ALIASES)


def example(directive: str) -> str:
    """A hint that shows a directive at work; aliases too."""
    return f"for example: {_EXAMPLES[ALIASES.get(directive, directive)]}"


def unknown_directive(directive: Word) -> UsageError:
    """The error for a word that is no directive."""
    written = directive.text
    if written.upper() in DIRECTIVES:
        hint = f"directives are written in capitals: {written.upper()}"
    else:
        hint = suggest(written.upper(), DIRECTIVES)
    return directive.place.error(f"expected a directive, found {written[:40]!r}", hint=hint)


def suggest(written: str, known: tuple[str, ...]) -> str:
    """A hint: the known word that was probably meant, else all of them."""
    close = difflib.get_close_matches(written[:40], known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"

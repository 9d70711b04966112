"""What every command gets: its settings, its printer, and the node's API when it asks for it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from formation.cli.output import Format, Printer
from formation.core.errors import UsageError

if TYPE_CHECKING:
    from formation.cli.client import Client
    from formation.core.config import Value
    from formation.core.keys import KeyPair

_TOKEN_SIZE_MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Cli:
    """One invocation of the command line."""

    host: str | None = None
    on: str = ""
    """Another node whose API is wanted; empty: the one that answers."""
    config: Path | None = None
    format: Format = Format.TABLE
    quiet: bool = False
    headers: bool = True
    color: str = "auto"

    @cached_property
    def settings(self) -> dict[str, Value]:
        """Flags, environment, file and defaults, merged.

        Raises:
          UsageError: a source holds something malformed.
        """
        from formation.core.config import load_settings

        return load_settings({"client.host": self.host}, config=self.config)

    @property
    def config_file(self) -> Path:
        """The configuration file that is, or would be, read."""
        from formation.core.config import config_path

        return self.config or config_path(os.environ)

    @cached_property
    def out(self) -> Printer:
        """Where results and remarks go."""
        return Printer(format_=self.format, quiet=self.quiet, headers=self.headers, color=self.color)

    @cached_property
    def client(self) -> Client:
        """The API of the node that is wanted: of the one that answers, or through it of the one that `on` names.

        Raises:
          NotFoundError, ConflictError: no node, or several, are called so.
        """
        return self.own_client.at_node(self._node_id(), self._permit) if self.on else self.own_client

    def _node_id(self) -> str:
        from formation.core.errors import UsageError as NoIdError
        from formation.core.ids import pick_by_name_or_prefix, public_key_of_node

        try:
            public_key_of_node(self.on)
        except NoIdError:
            nodes = self.own_client.rows("/v1/nodes", "nodes")
            known = [(str(node.get("node_id", "")), str(node.get("name", ""))) for node in nodes]
            return pick_by_name_or_prefix(self.on, candidates=known, what="peer")
        return self.on

    def _permit(self, node_id: str) -> bytes:
        from formation.cli.wish import make_read_permit

        return make_read_permit(self, node_id)

    @cached_property
    def own_client(self) -> Client:
        """The API of the node that answers."""
        from formation.cli.client import Client

        host = self.setting("client.host")
        token_file = self.setting("client.token_file")
        token = _read_token(Path(token_file)) if token_file and host.startswith("http://") else ""
        return Client(host, token=token)

    def setting(self, name: str) -> str:
        """A setting's text."""
        return str(self.settings[name].value)

    def path(self, name: str) -> Path:
        """A setting that is a path."""
        return Path(self.setting(name)).expanduser()

    def key(self) -> KeyPair:
        """The account's key.

        Raises:
          NotFoundError, UsageError: as `read_key_file`.
        """
        from formation.core.keys import read_key_file

        return read_key_file(self.path("client.account_key"))

    def is_interactive(self) -> bool:
        """Whether a person can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def _read_token(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="ascii")[:_TOKEN_SIZE_MAX_BYTES].strip()
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"cannot read the API token in {path}: {exc}", hint="client.token_file names the file") from exc

"""`formation init`: everything that a machine needs before `formation node` can run, made once."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from formation.cli.context import Cli
from formation.cli.output import Column
from formation.core.errors import ConflictError, FormationError, HostError, UsageError

if TYPE_CHECKING:
    from formation.core.keys import KeyPair
    from formation.core.manifest import Manifest

_CONFIG_MODE = 0o600
_DIRECTORY_MODE = 0o700
_NODE_KEY_NAME = "node.key"
_MS_PER_S = 1000
_LABEL_LENGTH_MAX = 63

EXAMPLES = (
    "formation init                                  a network of this machine alone",
    "formation init --manifest friends.toml          join the network that the file describes",
    "formation init --name attic --network home      names of your own",
)

_COLUMNS = (
    Column("", lambda row: str(row["done"])),
    Column("", lambda row: str(row["what"])),
    Column("", lambda row: str(row["detail"]), whole=True),
    Column("", lambda row: str(row["path"]), whole=True),
)


def init(
    cli: Cli,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="FILE", help="Join this network instead of founding one.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="This node's name. Default: the host's.")] = None,
    network: Annotated[str | None, typer.Option("--network", metavar="NAME", help="The new network's name.")] = None,
    listen: Annotated[
        list[str] | None, typer.Option("--listen", metavar="MULTIADDR", help="Where the node listens for others.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", metavar="DIRECTORY", help="The node's directory.")] = None,
) -> None:
    """Make configuration, account key, node key and network manifest; what exists is kept."""
    from formation.core.ids import check_label

    if manifest is not None and network is not None:
        raise UsageError("--manifest and --network exclude each other", hint="the manifest names its network")
    chosen: dict[str, object] = {
        "node.name": check_label(name or _kept(cli, "node.name") or host_label(), what="--name"),
        "node.listen": list(listen) if listen else None,
        "node.data_dir": str(data_dir.absolute()) if data_dir else None,
    }
    _check_listen(chosen["node.listen"])
    rows = _Init(cli, chosen).run(manifest, network=check_label(network or "home", what="--network"))
    cli.out.headers = False
    cli.out.rows(rows, _COLUMNS, name="path")
    cli.out.hint("\nNext: formation node        (runs in the foreground)\n      formation status      (in another terminal)")


class _Init:
    """One run; each step says what it did."""

    def __init__(self, cli: Cli, chosen: dict[str, object]) -> None:
        self._cli = cli
        self._chosen = {key: value for key, value in chosen.items() if value is not None}
        self._rows: list[dict[str, str]] = []

    def run(self, given: Path | None, *, network: str) -> list[dict[str, str]]:
        manifest_path = self._cli.path("node.manifest")
        data_dir = Path(str(self._chosen.get("node.data_dir") or self._cli.path("node.data_dir")))
        # Everything that can be refused is looked at before anything is made.
        existing, joined = self._manifests(manifest_path, given)
        try:
            self._config()
            account = self._key("account key", self._cli.path("client.account_key"))
            self._rows[-1]["detail"] = str(account.account_id)
            data_dir.mkdir(parents=True, exist_ok=True, mode=_DIRECTORY_MODE)
            node_key = self._key("node key", data_dir / _NODE_KEY_NAME)
            self._rows[-1]["detail"] = str(node_key.node_id)
            self._manifest(manifest_path, existing, joined or self._found(given, network, node_key))
        except OSError as exc:
            raise HostError(
                f"cannot write {exc.filename}: {exc.strerror}", hint="mend its owner or mode, or choose another place"
            ) from exc
        return self._rows

    def _manifests(self, path: Path, given: Path | None) -> tuple[Manifest | None, Manifest | None]:
        from formation.core.manifest import read_manifest

        existing = read_manifest(path) if path.exists() else None
        joined = None
        if given is not None:
            try:
                joined = read_manifest(given)
            except UsageError as error:
                if not _is_single_draft(given):
                    raise UsageError(
                        error.message,
                        hint=error.hint
                        if "network sign" in error.hint
                        else "a member of the network has the signed file; drafts are for formation demo",
                    ) from error
        if existing is not None and given is not None and (joined is None or joined.network_id != existing.network_id):
            raise ConflictError(
                f"this machine is in network {existing.name!r} already ({path})",
                hint=f"to leave it, move {path} and the node's data away first",
            )
        return existing, joined

    def _config(self) -> None:
        from formation.core.config import load_file

        path = self._cli.config_file
        if path.exists():
            had = load_file(path)
            changed = [key for key, value in self._chosen.items() if key in had and had[key] != value]
            if changed:
                raise ConflictError(f"{path} says otherwise of {changed[0]}", hint=f"edit {path}, or leave the flag away")
            missing = {key: value for key, value in self._chosen.items() if key not in had and key != "node.name"}
            if missing:
                raise ConflictError(
                    f"{path} exists and lacks {next(iter(missing))}", hint=f"add it to {path}, or leave the flag away"
                )
            self._say("kept", "configuration", path)
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=_DIRECTORY_MODE)
        lines = ["# Formation. Every setting with its meaning: formation node --print-config", "[node]"]
        lines += [f"{key.removeprefix('node.')} = {json.dumps(value)}" for key, value in self._chosen.items()]
        _write_new(path, "\n".join(lines) + "\n")
        self._say("made", "configuration", path)

    def _key(self, what: str, path: Path) -> KeyPair:
        from formation.core.keys import KeyPair, read_key_file, write_key_file

        done = "kept" if path.exists() else "made"
        if done == "made":
            write_key_file(path, KeyPair.generate())
        key = read_key_file(path)
        self._say(done, what, path)
        return key

    def _found(self, given: Path | None, network: str, key: KeyPair) -> Manifest:
        from formation.core.manifest import found_network, read_draft

        name, addresses = str(self._chosen["node.name"]), self._addresses()
        if given is not None:
            draft = read_draft(given)
            network, (name, addresses) = draft.name, (draft.voters[0][0], list(draft.voters[0][1]))
        return found_network(network, voters=[(name, key, addresses)], founded_ms=int(time.time() * _MS_PER_S))

    def _addresses(self) -> list[str]:
        """Where others would dial this node: what it listens on, with its public address for `any`."""
        listen = self._chosen.get("node.listen") or self._cli.settings["node.listen"].value
        assert isinstance(listen, list)
        public = self._cli.setting("node.public_address")
        return [str(address).replace("/ip4/0.0.0.0/", f"/ip4/{public}/").replace("/ip6/::/", "/ip6/::1/") for address in listen]

    def _manifest(self, path: Path, existing: Manifest | None, wanted: Manifest) -> None:
        manifest = existing or wanted
        if existing is None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=_DIRECTORY_MODE)
            _write_new(path, wanted.to_toml())
        self._say("kept" if existing else "made", "network", path)
        self._rows[-1]["detail"] = f"{manifest.name}, {len(manifest.voters)} voters, id {manifest.network_id.hex()[:16]}…"

    def _say(self, done: str, what: str, path: Path) -> None:
        self._rows.append({"done": done, "what": what, "detail": "", "path": str(path)})


def host_label() -> str:
    """The host's name as a DNS label."""
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in socket.gethostname().split(".")[0].lower())
    return label.strip("-")[:_LABEL_LENGTH_MAX].strip("-") or "node"


def _kept(cli: Cli, name: str) -> str:
    return cli.setting(name) if cli.config is None or cli.config.exists() else ""


def _check_listen(addresses: object) -> None:
    if isinstance(addresses, list):
        for address in addresses:
            if not str(address).startswith(("/ip4/", "/ip6/", "/dns")) or '"' in str(address):
                raise UsageError(f"--listen: {address!r} is not a multiaddr", hint="write /ip4/0.0.0.0/tcp/4700")


def _is_single_draft(path: Path) -> bool:
    from formation.core.manifest import read_draft

    try:
        text = path.read_text(encoding="utf-8")
        return "node_id" not in text and "signature" not in text and len(read_draft(path).voters) == 1
    except (FormationError, OSError, UnicodeDecodeError):
        return False


def _write_new(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _CONFIG_MODE)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)

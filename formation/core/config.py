"""Configuration: where things are, and which source decides.

One TOML file serves the command line and the node; precedence is flags, then environment, then file, then default.
The merge is one pure function (`merge_settings`); only `load_file` reads anything. Every setting stands in `SETTINGS`
with its meaning, and what is not there is refused by name.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formation.core.errors import UsageError

# A configuration that a person wrote is a few hundred bytes; a megabyte of TOML is another file.
FILE_SIZE_MAX_BYTES = 1024 * 1024
# sun_path (unix(7)) holds 108 bytes with the closing NUL.
SOCKET_PATH_SIZE_MAX_BYTES = 107


@dataclass(frozen=True, slots=True)
class Setting:
    """One knob."""

    kind: type
    """str, int, or list (of str)."""
    meaning: str
    env: str = ""
    choices: tuple[str, ...] = ()
    may_be_empty: bool = False
    """A list of none is a value."""


SETTINGS: dict[str, Setting] = {
    "client.host": Setting(str, "the node's API: a unix socket's path, or http://HOST:PORT", env="FORMATION_HOST"),
    "client.account_key": Setting(str, "file with the account's key", env="FORMATION_ACCOUNT_KEY"),
    "client.token_file": Setting(str, "file with the API token, for http://", env="FORMATION_TOKEN_FILE"),
    "node.name": Setting(str, "the node's name, for people"),
    "node.data_dir": Setting(str, "keys, state, images, VMs", env="FORMATION_DATA"),
    "node.cache_dir": Setting(str, "downloaded packages, shared by the nodes of one user"),
    "node.manifest": Setting(str, "the network's manifest", env="FORMATION_NETWORK"),
    "node.listen": Setting(list, "multiaddrs to listen on"),
    "node.allow_peers": Setting(list, "ids of the nodes that are let in, besides voters; none: all are", may_be_empty=True),
    "node.deny_peers": Setting(list, "ids of nodes that are not let in", may_be_empty=True),
    "node.network_key": Setting(str, "file with the key of a private network; empty: anybody may connect"),
    "node.security": Setting(str, "what secures connections; both: noise, else tls", choices=("noise", "tls", "both")),
    "node.operators": Setting(
        list, "accounts that may read this node's status, peers and metrics through other nodes", may_be_empty=True
    ),
    "node.kademlia": Setting(
        str,
        "answer in Kademlia (server) or only ask (client); auto: as others can dial us",
        choices=("auto", "server", "client"),
    ),
    "node.mdns": Setting(str, "find nodes of this network on the LAN, and be found there", choices=("on", "off")),
    "node.roles": Setting(list, "what this node is for, told to all: gpu, ingress, relay, …", may_be_empty=True),
    "node.labels": Setting(list, "what VMs may ask of this node: region=eu, disk=ssd, …", may_be_empty=True),
    "node.relay": Setting(
        str,
        "whether this node relays connections of nodes behind NAT; auto: while others reach it",
        choices=("auto", "on", "off"),
    ),
    "node.public_address": Setting(str, "host or IP at which published ports are reached"),
    "node.api_socket": Setting(str, "unix socket of the HTTP API"),
    "node.api_tcp": Setting(str, "HOST:PORT of the HTTP API as well; empty: none"),
    "node.hypervisor": Setting(str, "which hypervisor runs VMs", choices=("auto", "qemu", "none")),
    "node.accelerator": Setting(str, "hardware virtualisation or emulation", choices=("auto", "kvm", "tcg")),
    "node.vcpus": Setting(int, "vCPUs offered to VMs; 0: twice the host's cores"),
    "node.memory_mib": Setting(int, "memory offered to VMs; 0: the host's less 1 GiB or a quarter"),
    "node.disk_gib": Setting(int, "disk offered to VMs; 0: what is free less a tenth"),
    "node.log_level": Setting(
        str, "least level that is logged", env="FORMATION_LOG", choices=("debug", "info", "warning", "error")
    ),
    "node.log_format": Setting(str, "how lines are written", choices=("auto", "console", "json")),
}


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's value and the source that won."""

    value: Any
    origin: str
    """`flag`, `env NAME`, the file's path, or `default`."""


def config_path(env: Mapping[str, str]) -> Path:
    """The configuration file: `$FORMATION_CONFIG`, else in the XDG configuration directory."""
    if env.get("FORMATION_CONFIG"):
        return Path(env["FORMATION_CONFIG"])
    return _xdg(env, "XDG_CONFIG_HOME", ".config") / "formation" / "config.toml"


def default_values(env: Mapping[str, str], *, is_root: bool) -> dict[str, Any]:
    """What holds when nobody says anything.

    Root keeps a machine's node where the FHS wants it, anybody else below their home.
    """
    data = Path("/var/lib/formation") if is_root else _xdg(env, "XDG_DATA_HOME", ".local/share") / "formation"
    cache = Path("/var/cache/formation") if is_root else _xdg(env, "XDG_CACHE_HOME", ".cache") / "formation"
    if is_root:
        socket = Path("/run/formation/node.sock")
    elif env.get("XDG_RUNTIME_DIR"):
        socket = Path(env["XDG_RUNTIME_DIR"]) / "formation" / "node.sock"
    else:
        socket = data / "node.sock"
    return {
        "client.host": str(socket),
        "client.account_key": str(config_path(env).parent / "account.key"),
        "client.token_file": "",
        "node.name": "",
        "node.data_dir": str(data),
        "node.cache_dir": str(cache),
        "node.manifest": str(config_path(env).parent / "network.toml"),
        "node.listen": ["/ip4/0.0.0.0/tcp/4700"],
        "node.allow_peers": [],
        "node.deny_peers": [],
        "node.network_key": "",
        "node.security": "noise",
        "node.operators": [],
        "node.kademlia": "auto",
        "node.mdns": "off",
        "node.roles": [],
        "node.labels": [],
        "node.relay": "auto",
        "node.public_address": "127.0.0.1",
        "node.api_socket": str(socket),
        "node.api_tcp": "",
        "node.hypervisor": "auto",
        "node.accelerator": "auto",
        "node.vcpus": 0,
        "node.memory_mib": 0,
        "node.disk_gib": 0,
        "node.log_level": "info",
        "node.log_format": "auto",
    }


def load_file(path: Path, *, must_exist: bool = False) -> dict[str, Any]:
    """The settings in a file, by dotted name; empty when there is none.

    Raises:
      UsageError: unreadable, not TOML, unknown key, wrong type; names file and key.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            data = file.read(FILE_SIZE_MAX_BYTES + 1)
    except FileNotFoundError as exc:
        if must_exist:
            raise UsageError(f"no configuration at {path}", hint="formation init makes one") from exc
        return {}
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="check its owner and mode") from exc
    if len(data) > FILE_SIZE_MAX_BYTES:
        raise UsageError(f"{path}: larger than {FILE_SIZE_MAX_BYTES} bytes", hint="is this a configuration file?")
    try:
        document = tomllib.loads(data.decode())
    # Its own errors and those of int() are ValueErrors; a thousand brackets exhaust the stack.
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path}: not TOML: {exc}", hint="formation node --print-config shows the form") from exc
    found: dict[str, Any] = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {section} stands outside a section", hint="put it below [client] or [node]")
        for key, value in table.items():
            found[f"{section}.{key}"] = check_value(f"{section}.{key}", value, where=str(path))
    return found


def merge_settings(
    *, flags: Mapping[str, Any], env: Mapping[str, str], file: Mapping[str, Any], file_path: str, defaults: Mapping[str, Any]
) -> dict[str, Value]:
    """Each setting's value with its origin: flags, then environment, then file, then default.

    Args:
      flags: by dotted name; None means not given.

    Raises:
      UsageError: a value that its setting does not allow.
    """
    merged: dict[str, Value] = {}
    for name, setting in SETTINGS.items():
        if flags.get(name) is not None:
            merged[name] = Value(check_value(name, flags[name], where="flag"), "flag")
        elif setting.env and env.get(setting.env):
            merged[name] = Value(check_value(name, env[setting.env], where=f"${setting.env}"), f"env {setting.env}")
        elif name in file:
            merged[name] = Value(file[name], file_path)
        else:
            merged[name] = Value(defaults[name], "default")
    return merged


def check_value(name: str, value: Any, *, where: str) -> Any:
    """The value, if its setting allows it.

    Raises:
      UsageError: unknown setting, wrong type, not one of the choices.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        raise UsageError(
            f"{where}: unknown setting {name}", hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(SETTINGS)}"
        )
    right_type = isinstance(value, setting.kind) and not isinstance(value, bool)
    if setting.kind is list:
        is_filled = setting.may_be_empty or bool(value)
        right_type = isinstance(value, list | tuple) and is_filled and all(isinstance(v, str) for v in value)
    if not right_type:
        wanted = {str: "text", int: "a whole number", list: "a list of texts"}[setting.kind]
        raise UsageError(f"{where}: {name} must be {wanted}, not {value!r}", hint=setting.meaning)
    if setting.kind is int and value < 0:
        raise UsageError(f"{where}: {name} must not be negative", hint=setting.meaning)
    if setting.choices and value not in setting.choices:
        raise UsageError(f"{where}: {name} is {value!r}", hint=f"one of: {', '.join(setting.choices)}")
    return list(value) if setting.kind is list else value


def load_settings(
    flags: Mapping[str, Any], *, env: Mapping[str, str] | None = None, config: Path | None = None
) -> dict[str, Value]:
    """The settings of this process.

    Raises:
      UsageError: as `load_file` and `merge_settings`.
    """
    environment = os.environ if env is None else env
    path = config or config_path(environment)
    asked_for = config is not None or bool(environment.get("FORMATION_CONFIG"))
    return merge_settings(
        flags=flags,
        env=environment,
        file=load_file(path, must_exist=asked_for),
        file_path=str(path),
        defaults=default_values(environment, is_root=os.geteuid() == 0),
    )


def settings_to_toml(settings: Mapping[str, Value]) -> str:
    """The settings as a file that `load_file` reads back, each with its meaning and origin."""
    lines: list[str] = []
    section = ""
    for name, entry in settings.items():
        head, _, key = name.partition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"# {SETTINGS[name].meaning} ({entry.origin})", f"{key} = {_toml_value(entry.value)}"]
    return "\n".join(lines) + "\n"


def check_socket_path(path: Path) -> Path:
    """The path, if a unix socket can have it.

    Raises:
      UsageError: too long for the kernel.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_SIZE_MAX_BYTES:
        raise UsageError(
            f"socket path {path} is longer than {SOCKET_PATH_SIZE_MAX_BYTES} bytes", hint="choose a shorter directory"
        )
    return path


def _toml_value(value: Any) -> str:
    import json

    # JSON's strings, numbers and arrays of them are TOML's too, but for surrogate pairs in escapes and a raw DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _xdg(env: Mapping[str, str], name: str, below_home: str) -> Path:
    return Path(env[name]) if env.get(name) else Path(env.get("HOME", "/")) / below_home

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from formation.core.config import (
    FILE_SIZE_MAX_BYTES,
    SETTINGS,
    SOCKET_PATH_SIZE_MAX_BYTES,
    Value,
    check_socket_path,
    check_value,
    config_path,
    default_values,
    load_file,
    load_settings,
    merge_settings,
    settings_to_toml,
)
from formation.core.errors import UsageError

HOME = {"HOME": "/home/ada"}
DEFAULTS = default_values(HOME, is_root=False)


def merged(
    flags: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None, file: Mapping[str, Any] | None = None
) -> dict[str, Value]:
    return merge_settings(flags=flags or {}, env=env or {}, file=file or {}, file_path="/etc/f.toml", defaults=DEFAULTS)


def test_flags_win_over_environment_over_file_over_default() -> None:
    """Each source is asked in its turn, and the origin says which one answered."""
    name, env, file = "node.data_dir", {"FORMATION_DATA": "/env"}, {"node.data_dir": "/file"}
    assert merged({name: "/flag"}, env, file)[name] == Value("/flag", "flag")
    assert merged({name: None}, env, file)[name] == Value("/env", "env FORMATION_DATA")
    assert merged({}, {"FORMATION_DATA": ""}, file)[name] == Value("/file", "/etc/f.toml")
    assert merged()[name] == Value("/home/ada/.local/share/formation", "default")


def test_a_setting_without_a_variable_cannot_come_from_the_environment() -> None:
    """An empty variable name is no name."""
    assert merged(env={"": "other"})["node.name"] == Value("", "default")


def test_a_false_flag_is_still_given() -> None:
    """Zero and the empty text are values; only None means not given."""
    found = merged({"node.vcpus": 0, "node.name": ""}, file={"node.vcpus": 4, "node.name": "a"})
    assert (found["node.vcpus"], found["node.name"]) == (Value(0, "flag"), Value("", "flag"))


def test_every_setting_has_a_default() -> None:
    """Defaults and settings name the same knobs, and each default is allowed."""
    for is_root in (False, True):
        defaults = default_values(HOME, is_root=is_root)
        assert set(defaults) == set(SETTINGS)
        for name, value in defaults.items():
            assert check_value(name, value, where="default") == value


def test_variables_are_unique() -> None:
    """One variable cannot set two things."""
    names = [setting.env for setting in SETTINGS.values() if setting.env]
    assert len(set(names)) == len(names)


def test_root_keeps_things_where_the_fhs_wants_them() -> None:
    """A machine's node is no user's."""
    defaults = default_values(HOME, is_root=True)
    assert defaults["node.data_dir"] == "/var/lib/formation"
    assert defaults["node.cache_dir"] == "/var/cache/formation"
    assert defaults["node.api_socket"] == defaults["client.host"] == "/run/formation/node.sock"


def test_a_user_keeps_things_at_home() -> None:
    """Without XDG variables all lies below the home directory."""
    assert DEFAULTS["node.data_dir"] == "/home/ada/.local/share/formation"
    assert DEFAULTS["node.cache_dir"] == "/home/ada/.cache/formation"
    assert DEFAULTS["node.api_socket"] == "/home/ada/.local/share/formation/node.sock"
    assert DEFAULTS["client.account_key"] == "/home/ada/.config/formation/account.key"
    assert default_values({}, is_root=False)["node.data_dir"] == "/.local/share/formation"


def test_xdg_variables_move_things() -> None:
    """Each kind of directory can be moved by itself."""
    env = {"XDG_CONFIG_HOME": "/c", "XDG_DATA_HOME": "/d", "XDG_CACHE_HOME": "/k", "XDG_RUNTIME_DIR": "/r"}
    defaults = default_values(env, is_root=False)
    assert defaults["node.manifest"] == "/c/formation/network.toml"
    assert defaults["node.data_dir"] == "/d/formation"
    assert defaults["node.cache_dir"] == "/k/formation"
    assert defaults["client.host"] == "/r/formation/node.sock"


def test_the_configuration_file_can_be_named() -> None:
    """FORMATION_CONFIG moves the file and what lies beside it."""
    env = {"FORMATION_CONFIG": "/x/y.toml", "XDG_CONFIG_HOME": "/c"}
    assert config_path(env) == Path("/x/y.toml")
    assert default_values(env, is_root=False)["client.account_key"] == "/x/account.key"


@pytest.mark.parametrize(
    ("name", "value", "message", "hint"),
    [
        ("node.nam", "x", "unknown setting node.nam", "did you mean node.name?"),
        ("zzzzzz", "x", "unknown setting zzzzzz", "known: client.host"),
        ("node.name", 1, "node.name must be text, not 1", "the node's name"),
        ("node.name", ["a"], "node.name must be text", "the node's name"),
        ("node.vcpus", "2", "node.vcpus must be a whole number, not '2'", "vCPUs"),
        ("node.vcpus", 2.0, "node.vcpus must be a whole number", "vCPUs"),
        ("node.vcpus", True, "node.vcpus must be a whole number", "vCPUs"),
        ("node.vcpus", -1, "node.vcpus must not be negative", "vCPUs"),
        ("node.listen", "/ip4", "node.listen must be a list of texts", "multiaddrs"),
        ("node.listen", [], "node.listen must be a list of texts", "multiaddrs"),
        ("node.listen", [1], "node.listen must be a list of texts", "multiaddrs"),
        ("node.hypervisor", "xen", "node.hypervisor is 'xen'", "one of: auto, qemu, none"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name: str, value: object, message: str, hint: str) -> None:
    """The error says where, which setting and what is wanted."""
    with pytest.raises(UsageError) as caught:
        check_value(name, value, where="here")
    assert caught.value.message.startswith(f"here: {message}")
    assert caught.value.hint.startswith(hint)


def test_a_bad_variable_is_named() -> None:
    """Who set it must know which one to unset."""
    with pytest.raises(UsageError, match=r"^\$FORMATION_LOG: node.log_level is 'loud'$"):
        merged(env={"FORMATION_LOG": "loud"})


def test_lists_are_copied() -> None:
    """A tuple of flags becomes a list, as a file has it."""
    assert check_value("node.listen", ("/ip4/127.0.0.1/tcp/1",), where="flag") == ["/ip4/127.0.0.1/tcp/1"]
    assert check_value("node.deny_peers", [], where="flag") == []


def test_a_file_gives_its_settings_by_dotted_name(tmp_path: Path) -> None:
    """Sections and keys become names."""
    path = tmp_path / "c.toml"
    path.write_text('[node]\nname = "a"\nvcpus = 3\nlisten = ["/x"]\n[client]\nhost = "/s"\n')
    assert load_file(path) == {"node.name": "a", "node.vcpus": 3, "node.listen": ["/x"], "client.host": "/s"}


def test_a_missing_file_is_empty_unless_it_was_asked_for(tmp_path: Path) -> None:
    """A configuration is not needed, but one that was named must be there."""
    assert load_file(tmp_path / "c.toml") == {}
    with pytest.raises(UsageError, match="no configuration at") as caught:
        load_file(tmp_path / "c.toml", must_exist=True)
    assert caught.value.hint == "formation init makes one"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'name = "a"', "name stands outside a section"),
        (b"[node]\nnam = 'a'", "unknown setting node.nam"),
        (b"[nod]\nname = 'a'", "unknown setting nod.name"),
        (b"[node]\nvcpus = 'a'", "node.vcpus must be a whole number"),
        (b"[node", "not TOML"),
        (b"\xff", "not TOML"),
        (b"a = " + b"[" * 10_000, "not TOML"),
        (b"a = " + b"1" * 5_000, "not TOML"),
        (b"#" * (FILE_SIZE_MAX_BYTES + 1), "larger than 1048576 bytes"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """The error starts with the file, and has a hint."""
    path = tmp_path / "c.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        load_file(path)
    assert caught.value.message.startswith(f"{path}: {message}")
    assert caught.value.hint


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    """What cannot be read says why."""
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        load_file(tmp_path)


def test_settings_are_loaded_from_all_sources(tmp_path: Path) -> None:
    """One call asks flags, environment, file and defaults."""
    path = tmp_path / "c.toml"
    path.write_text('[node]\nname = "a"\n')
    env = {"FORMATION_LOG": "debug", "HOME": str(tmp_path)}
    found = load_settings({"node.vcpus": 2}, env=env, config=path)
    assert found["node.vcpus"].origin == "flag"
    assert found["node.log_level"].origin == "env FORMATION_LOG"
    assert found["node.name"] == Value("a", str(path))
    assert found["node.disk_gib"].origin == "default"
    assert load_settings({}, env={"FORMATION_CONFIG": str(path)})["node.name"].value == "a"


@pytest.mark.parametrize("named_by", ["flag", "variable"])
def test_a_named_configuration_must_exist(tmp_path: Path, named_by: str) -> None:
    """A misspelt path is not silently a default."""
    path = tmp_path / "no.toml"
    with pytest.raises(UsageError, match="no configuration at"):
        load_settings(
            {}, env={} if named_by == "flag" else {"FORMATION_CONFIG": str(path)}, config=path if named_by == "flag" else None
        )


def test_this_processs_environment_is_the_default_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who passes no environment means os.environ."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("FORMATION_CONFIG", raising=False)
    monkeypatch.setenv("FORMATION_LOG", "error")
    assert load_settings({})["node.log_level"].value == "error"


def test_printed_settings_can_be_loaded(tmp_path: Path) -> None:
    """settings_to_toml writes a file that load_file reads back, whatever letters its values have."""
    awkward = 'a"b\\c\n\t\x7f\x01é😀#'
    found = merged({"node.name": awkward, "node.listen": ["/a", awkward], "node.vcpus": 3})
    path = tmp_path / "c.toml"
    path.write_text(settings_to_toml(found))
    assert load_file(path) == {name: entry.value for name, entry in found.items()}
    assert "# vCPUs offered to VMs; 0: twice the host's cores (flag)" in path.read_text()


def test_a_socket_path_has_a_limit() -> None:
    """The kernel takes 107 bytes, not letters."""
    path = Path("/" + "a" * (SOCKET_PATH_SIZE_MAX_BYTES - 1))
    assert check_socket_path(path) == path
    for long in (Path(f"{path}a"), Path("/" + "ü" * 60)):
        with pytest.raises(UsageError, match="is longer than 107 bytes"):
            check_socket_path(long)


def test_the_merge_does_not_read_the_environment_of_this_process() -> None:
    """Merging is pure."""
    before = dict(os.environ)
    merged()
    assert dict(os.environ) == before

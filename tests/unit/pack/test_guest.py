from __future__ import annotations

from dataclasses import replace

import pytest

from formation.core.errors import UsageError
from formation.pack.cpio import read_cpio
from formation.pack.guest import VmGuestConfig, vm_config_cpio

CONFIG = VmGuestConfig(vm_id="vm-aaaaaaaaaaaaaaaa", hostname="web-1")


def files(config: VmGuestConfig) -> dict[str, bytes]:
    return {entry.name.rpartition("/")[2]: entry.data for entry in read_cpio(vm_config_cpio(config))}


def test_a_vm_is_told_its_name_and_network() -> None:
    """The archive holds one value a file, in the form that the guest's init reads."""
    told = files(replace(CONFIG, env={"B": "2\nlines", "A": "$(x)"}, expose=((80, "tcp"),)))
    assert told["hostname"] == b"web-1\n"
    assert told["env"] == b"A=$(x)\0B=2\nlines\0"
    assert (told["address"], told["netmask"], told["gateway"]) == (b"10.0.2.15\n", b"255.255.255.0\n", b"10.0.2.2\n")
    assert told["dns"] == b"nameserver 10.0.2.3\n"
    assert told["expose"] == b"tcp 80 0050\n"


def test_a_vm_without_network_and_own_ports() -> None:
    """What is not given has no file: the image's ports count, and no network is set up."""
    told = files(replace(CONFIG, address=""))
    assert "address" not in told
    assert "expose" not in told


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, hostname="a b"),
        replace(CONFIG, vm_id="../x"),
        replace(CONFIG, env={"A=B": "1"}),
        replace(CONFIG, env={"A": "\0"}),
        replace(CONFIG, address="10.0.2.15/33"),
        replace(CONFIG, gateway="$(reboot)"),
    ],
)
def test_malformed_values_never_reach_a_guest(config: VmGuestConfig) -> None:
    """A name, address or variable that is not one is an error of the host."""
    with pytest.raises(UsageError):
        vm_config_cpio(config)

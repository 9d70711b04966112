from __future__ import annotations

from formation.vmm.devices import Machine, accelerator_arguments, qemu_arguments

MACHINE = Machine(
    vm_id="vm-a", vcpus=2, memory_mib=512, kernel_path="/k,1", netdev="user,id=nic0", mac="52:54:00:00:00:01", accelerator="tcg"
)


def test_machine_is_paused_confined_and_bare() -> None:
    """Every VM starts paused, in a sandbox, without default devices, and ends instead of rebooting."""
    arguments = qemu_arguments(MACHINE)
    assert {"-S", "-nodefaults", "-no-user-config", "-no-reboot"} <= set(arguments)
    assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]
    assert arguments[arguments.index("-m") + 1] == "512"
    assert arguments[arguments.index("-smp") + 1] == "2"
    assert arguments[arguments.index("-kernel") + 1] == "/k,1"


def test_no_network_no_device() -> None:
    """Without a lease there is no network device."""
    bare = Machine(
        vm_id="vm-a", vcpus=1, memory_mib=128, kernel_path="/k", netdev="", mac="", accelerator="kvm", has_disk=False
    )
    text = " ".join(qemu_arguments(bare))
    assert "virtio-net" not in text
    assert "virtio-blk" not in text
    assert "virtio-net" in " ".join(qemu_arguments(MACHINE))


def test_accelerators() -> None:
    """KVM takes the host's processor, TCG everything that it knows with a bounded cache."""
    assert accelerator_arguments("kvm")[1] == "kvm"
    assert "tb-size=64" in accelerator_arguments("tcg")[1]

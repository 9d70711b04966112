"""From a VM to the devices of its machine, as QEMU's arguments.

Pure. One list for every VM: q35, PVH kernel, virtio everything, no device that nobody asked for. Paths of sockets and of
the disk are relative to the VM's folder, which is the process's working directory: they stay short wherever the data
lives, and no comma of a path can end an option.
"""

from __future__ import annotations

from dataclasses import dataclass

from formation.pack.guest import AGENT_PORT_NAME, KERNEL_ARGUMENTS

QMP_SOCKET = "qmp.sock"
SERIAL_SOCKET = "serial.sock"
AGENT_SOCKET = "agent.sock"
DISK_FILE = "disk.raw"
INITRD_FILE = "initrd.cpio"

# Translated code. QEMU's default grows to 1 GiB per VM; 64 MiB boots as fast (facts: 130 MB overhead at most).
TCG_CACHE_MIB = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a VM's hypervisor process is made of."""

    vm_id: str
    vcpus: int
    memory_mib: int
    kernel_path: str
    netdev: str
    """`-netdev` argument of the device `nic0`; empty: no network."""
    mac: str
    accelerator: str
    """`kvm` or `tcg`."""
    has_disk: bool = True
    kernel_arguments: str = KERNEL_ARGUMENTS


def accelerator_arguments(accelerator: str) -> tuple[str, ...]:
    """`-accel` and `-cpu`; the probe uses the very same ones as the VMs."""
    if accelerator == "kvm":
        # Some hosts refuse that MSR although they announce it; guests do without.
        return ("-accel", "kvm", "-cpu", "host,-arch-capabilities")
    return ("-accel", f"tcg,thread=multi,tb-size={TCG_CACHE_MIB}", "-cpu", "max")


def confinement_arguments() -> tuple[str, ...]:
    """What the process may not do even when a guest breaks out of the device model: start programs, gain rights."""
    return ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")


def qemu_arguments(machine: Machine) -> tuple[str, ...]:
    """The arguments after the program's name. It starts paused (`-S`): nobody misses the guest's first words."""
    return (
        "-nodefaults",
        "-no-user-config",
        *("-name", machine.vm_id),
        *("-display", "none"),
        *("-machine", "q35"),
        *accelerator_arguments(machine.accelerator),
        *("-m", str(machine.memory_mib)),
        *("-smp", str(machine.vcpus)),
        *("-kernel", machine.kernel_path),
        *("-initrd", INITRD_FILE),
        *("-append", machine.kernel_arguments),
        *_serial(),
        *_agent(),
        *(_disk() if machine.has_disk else ()),
        *(_nic(machine) if machine.netdev else ()),
        *("-object", "rng-random,id=entropy0,filename=/dev/urandom"),
        *("-device", "virtio-rng-pci,rng=entropy0"),
        *("-qmp", f"unix:{QMP_SOCKET},server=on,wait=off"),
        # A reset ends the process: a kernel panic becomes an exit that somebody sees.
        "-no-reboot",
        "-S",
        *confinement_arguments(),
    )


def _serial() -> tuple[str, ...]:
    return ("-chardev", f"socket,id=serial0,path={SERIAL_SOCKET},server=on,wait=off", "-serial", "chardev:serial0")


def _agent() -> tuple[str, ...]:
    return (
        *("-chardev", f"socket,id=agent0,path={AGENT_SOCKET},server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=ports0,max_ports=2"),
        *("-device", f"virtserialport,bus=ports0.0,chardev=agent0,name={AGENT_PORT_NAME}"),
    )


def _disk() -> tuple[str, ...]:
    return (
        *(
            "-blockdev",
            f"driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename={DISK_FILE},file.discard=unmap",
        ),
        *("-device", "virtio-blk-pci,drive=disk0,id=vda"),
    )


def _nic(machine: Machine) -> tuple[str, ...]:
    # No option ROM: nothing boots from the network, and its file is in a package of its own.
    return ("-netdev", machine.netdev, "-device", f"virtio-net-pci,netdev=nic0,mac={machine.mac},romfile=")

"""form-vmm: runs the VMs that the network placed on this node.

| component (C4) | file |
|---|---|
| Lifecycle Manager | `lifecycle` (which verb when), `plan` (desired, observed -> steps), `reconciler`, `memory`, `service` |
| Hypervisor Interface | `hypervisor` (port), `twin`, `qemu` and `qemu_vm` (adapter; over `qmp`, `process`, `files`), `choose` |
| | `console` (serial log and live streams), `words` (what guests say, as sentences), `pvh` (tiny guests) |
| what it needs below | `needs` (of state and pack), `ledger` (what this node holds) |
| Device Manager | `devices` |
| VM Allocator | `allocator` |

Theory of operation. The owner writes what a VM should be, the node that holds its placement what it is. Whatever
happens (a certified event, a guest's word, the end of a process, a sweep every few seconds) only says "look now": the
VM's one worker then compares desired with observed and does the first step of `plan` until the plan is empty. So a
lost event, a crash in the middle and a restart of the node all end in the same place.

A hypervisor process belongs to no node process: it has a session and a folder of its own, outlives the node's death,
and is adopted by its recorded identity (boot id, pid, start time) and its control socket. Everything that a step makes
is either found again by its folder or undone by the step that failed.
"""

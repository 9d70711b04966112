"""form-net: what a VM's network is on this node, and which of the node's own ports lead into it.

In this version every VM has QEMU's user-mode network (libslirp): a private 10.0.2.0/24 of its own with outbound access
through the node, and published ports forwarded from the node's address. It needs no privilege and no kernel module.
The room hands out leases (`service`), planned by a pure function (`ports`); the mesh between nodes, names and
isolation rules take their places beside them (mesh, ipam, policy, zone; design/house).

Limit worth knowing: libslirp lets a guest reach services that listen on the node's loopback address (as 10.0.2.2).
Nothing of Formation trusts loopback, but other programs on the node may.
"""

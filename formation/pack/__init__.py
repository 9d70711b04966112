"""Images: from a Formfile to files that boot, the same on every node.

| file | is |
|---|---|
| `formfile` | pure: the strict parser; `formfile_text`, `_directives`, `_checks` and `_user` are its parts |
| `passwords` | pure: sha512-crypt |
| `plan` | pure: from a Formfile and its files to the image's own layer |
| `manifest` | pure: what an image is made of, and its digest |
| `cpio` | pure: the archive format of an initramfs |
| `guest` | what runs inside a VM before its owner's program, and what it is told |
| `context` | adapter: reads the files that COPY takes, and nothing outside of them |
| `rootfs`, `vmlinux` | adapter: kernel and busybox out of Debian packages |
| `blobs`, `held` | adapter: content-addressed files on disk, and which images are whole |
| `transfer`, `pull` | blobs over peer-to-peer streams: the protocol with its server, and the way round bad holders |
| `service` | the one door for the rooms above |

An image is three blobs and a manifest: a PVH kernel, the base initramfs, and the layer that its Formfile makes. Blobs
are pulled as ranges from any holder; chunks that images share come with disk layers, in a later version.
"""

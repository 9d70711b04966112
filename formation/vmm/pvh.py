"""Tiny guests made by hand: an ELF file with a PVH note and a few machine instructions.

Pure. They boot in milliseconds without BIOS, kernel or assembler, which makes them the probe of an accelerator (does
this KVM really run a guest, and how fast?) and the guests of tests.
Sources: Xen, docs/misc/pvh.pandoc (entry state: 32-bit protected mode, flat segments, paging off); ELF-64 specification.
"""

from __future__ import annotations

import struct

# Where the file is loaded: at 1 MiB, the first address that is plain memory on every PC.
_LOAD_ADDRESS = 0x100000
_HEADER_SIZE_BYTES = 64
_PROGRAM_HEADER_SIZE_BYTES = 56
_NOTE_OFFSET = _HEADER_SIZE_BYTES + 2 * _PROGRAM_HEADER_SIZE_BYTES
_NOTE_SIZE_BYTES = 20
_CODE_ADDRESS = _LOAD_ADDRESS + _NOTE_OFFSET + _NOTE_SIZE_BYTES
# XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader jumps to.
_NOTE_TYPE = 18

PROBE_TEXT = b"FORMATION-PROBE-DONE\n"
# Two instructions a turn. A processor does them in 2 ms, TCG in 20 to 50 ms; a KVM that emulates every instruction
# (0.8 million a second, seen on a paravirtual host) would take 10 s.
PROBE_TURN_COUNT = 4_000_000

RESET = bytes.fromhex("b0fe e664 f4 ebfd")
"""Code: mov al,0xfe; out 0x64,al (the keyboard controller's reset line); hlt; back to hlt."""

SLEEP = bytes.fromhex("fa f4 ebfd")
"""Code: cli; hlt; back to hlt."""


def probe_payload() -> bytes:
    """An ELF file that counts, prints `PROBE_TEXT` on the first serial port and resets the machine."""
    return payload(count_down(PROBE_TURN_COUNT), PROBE_TEXT, RESET)


def count_down(turn_count: int) -> bytes:
    """Code: mov ecx,N; dec ecx; jnz back."""
    return b"\xb9" + struct.pack("<I", turn_count) + bytes.fromhex("49 75fd")


def payload(before: bytes, text: bytes, after: bytes) -> bytes:
    """An ELF file that runs `before`, prints `text` (no NUL inside) on the first serial port and runs `after`.

    Both are position-independent 32-bit code; `after` must not return.
    """
    assert b"\0" not in text
    # cld; mov esi,TEXT; mov dx,0x3f8; [lodsb; test al,al; jz +3; out dx,al; jmp back]
    printing_size = 1 + 5 + 4 + 8
    text_address = _CODE_ADDRESS + len(before) + printing_size + len(after)
    printing = b"\xfc\xbe" + struct.pack("<I", text_address) + bytes.fromhex("66baf803 ac 84c0 7403 ee ebf8")
    assert len(printing) == printing_size
    return _elf(before + printing + after + text + b"\0")


def _elf(code: bytes) -> bytes:
    image_size = _NOTE_OFFSET + _NOTE_SIZE_BYTES + len(code)
    note = struct.pack("<III4sI", 4, 4, _NOTE_TYPE, b"Xen\0", _CODE_ADDRESS)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",  # 64-bit, little endian, version 1
        *(2, 62, 1, _CODE_ADDRESS),  # executable, x86-64, version 1, entry
        *(_HEADER_SIZE_BYTES, 0, 0),  # program headers follow; no sections, no flags
        *(_HEADER_SIZE_BYTES, _PROGRAM_HEADER_SIZE_BYTES, 2, 0, 0, 0),
    )
    load = struct.pack("<IIQQQQQQ", 1, 7, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, image_size, image_size, 4096)
    note_address = _LOAD_ADDRESS + _NOTE_OFFSET
    noted = struct.pack("<IIQQQQQQ", 4, 4, _NOTE_OFFSET, note_address, note_address, _NOTE_SIZE_BYTES, _NOTE_SIZE_BYTES, 4)
    return header + load + noted + note + code

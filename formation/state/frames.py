"""Frames between replicas: one byte kind, then the value. Kinds 4 to 7, 9 and 10 are the spine's: `spine_values.Kind`."""

from __future__ import annotations

FRAME_BLOCK = b"\x01"
"""COSE_Sign1 of a block."""
FRAME_ACK = b"\x02"
"""COSE_Sign1 of an ack."""
FRAME_EVIDENCE = b"\x03"
"""CBOR of the Evidence against a lane."""
FRAME_FREEZE = b"\x08"
"""COSE_Sign1 of a freeze."""
FRAME_EQUIVOCATION = b"\x0f"
"""CBOR of an Equivocation."""

"""Frames between replicas: one byte kind, then the value."""

from __future__ import annotations

FRAME_BLOCK = b"\x01"
"""COSE_Sign1 of a block."""
FRAME_ACK = b"\x02"
"""COSE_Sign1 of an ack."""
FRAME_EVIDENCE = b"\x03"
"""CBOR of the Evidence against a lane."""
FRAME_PROPOSAL = b"\x04"
"""COSE_Sign1 of a proposal."""
FRAME_NOTARIZE = b"\x05"
FRAME_NULLIFY = b"\x06"
FRAME_FINALIZE = b"\x07"
"""COSE_Sign1 of a vote, in the context of its kind."""
FRAME_FREEZE = b"\x08"
"""COSE_Sign1 of a freeze."""

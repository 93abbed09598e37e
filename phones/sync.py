"""The records of ADB's `sync:` service, for both sides.

A request is a four-letter id, a u32 length and that many bytes, mostly a path; answers are records
of their own. All numbers are little-endian. Source: AOSP packages/modules/adb, SYNC.TXT and
file_sync_protocol.h.
"""

import struct

CHUNK_BYTES = 64 << 10
"""The most a DATA record may carry."""
PATH_MAX_BYTES = 1024

REQUEST = struct.Struct("<4sI")
STAT = struct.Struct("<4sIII")
"""STAT: id, mode, size, mtime; all zero for a file that is not there."""
STAT2 = struct.Struct("<4sIQQIIIIQqqq")
"""STA2, LST2: id, errno, device, inode, mode, links, uid, gid, size, atime, mtime, ctime."""
ENTRY = struct.Struct("<4sIIII")
"""DENT: id, mode, size, mtime, length of the name that follows."""
ENTRY2 = struct.Struct("<4sIQQIIIIQqqqI")
"""DNT2: as STA2, and the length of the name that follows."""
SEND2 = struct.Struct("<4sII")
"""SND2, second part: id, mode, flags (compression)."""
RECV2 = struct.Struct("<4sI")
"""RCV2, second part: id, flags (compression)."""


def request(word: bytes, payload: bytes = b"") -> bytes:
    """A request, or an answer of the same form (DATA, FAIL)."""
    return REQUEST.pack(word, len(payload)) + payload


def data_records(content: bytes) -> bytes:
    """The DATA records that carry `content`, one after the other, to go into one packet."""
    parts: list[bytes] = []
    for start in range(0, len(content), CHUNK_BYTES):
        part = content[start : start + CHUNK_BYTES]
        parts += (REQUEST.pack(b"DATA", len(part)), part)
    return b"".join(parts)

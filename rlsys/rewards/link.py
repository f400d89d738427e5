"""Messages between a reward worker and its child: length-prefixed pickles over a socket pair.

    parent -> child                                 child -> parent
    (functions, timeout_s)                          ("ready", [is_async, ...]) | ("failed", message)
    ("group", job, [Sample, ...])                   ("value", Call, {component: number}, time)
    ("call", [Call, ...])                           ("error" | "timeout", Call, detail, time)
    ("forget", job)

The two ends trust each other: both run the user's own code.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

HEADER = struct.Struct(">I")


def pack(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def read(stream: BinaryIO) -> Any:
    """The next message of a blocking stream. Raises EOFError when the other end is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    (length,) = HEADER.unpack(header)
    body = stream.read(length)
    if len(body) < length:
        raise EOFError
    return pickle.loads(body)

"""Events for TensorBoard: scalars by tag and step, in the file format that it reads.

Written by hand, since the libraries that write it import torch or TensorFlow, which no driver should. A file is a
sequence of records, length and data each with a masked CRC-32C (TFRecord); the data is an `Event`, in protobuf's wire
format. Sources: tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto, RFC 3720 for the CRC.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed


class EventWriter:
    """Appends to a new file in `folder`. TensorBoard forgets what earlier files say of steps from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 it is open for as long as the writer
        self._write(_text(3, "brain.Event:2"))
        start = _varint_field(1, 1)  # SessionLog.status START, which is what makes it forget
        self._write(_varint_field(2, first_step) + _bytes(7, start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The values of some tags after `step` steps."""
        summary = b"".join(
            _bytes(1, _text(1, tag) + _key(2, 5) + struct.pack("<f", value)) for tag, value in values.items()
        )
        self._write(_varint_field(2, step) + _bytes(5, summary))

    def close(self) -> None:
        """No more events."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        data = _key(1, 1) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data)))
        self._file.flush()


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint_field(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = tuple(map(_crc_of_byte, range(256)))


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

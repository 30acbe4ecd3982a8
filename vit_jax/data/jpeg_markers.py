"""Restart markers in JPEGs, for decoding a crop without the rest; EXIF orientation.

A JPEG's Huffman codes can only be decoded from the first one on, so decoding a small crop spends
most of its time on pixels outside the crop. Restart markers (ITU-T T.81, B.2.4.4) divide the codes
into segments that are decoded independently. `add_markers` inserts them with jpegtran, which
changes no pixel. It stores an index of the segments' lengths in an APP9 segment, which other
decoders ignore. `cut` joins the segments that a box needs into a smaller JPEG.
"""

import shutil
import struct
import subprocess
from collections.abc import Iterator

import numpy as np

from vit_jax.config import InputError

_NAME = b"vit_jax restart\0"
_HEAD = struct.Struct("<16sHI")  # name; MCUs per segment; bytes between the index and the codes
_SPACING = (16, 32)  # pixels between markers, if this divides a row; else the next larger divisor
_APP1, _ORIENTATION = 0xE1, 0x0112  # EXIF's segment and its tag of the orientation
_SOF, _PROGRESSIVE, _EOI, _SOS, _DRI, _APP9 = (0xC0, 0xC1), 0xC2, 0xD9, 0xDA, 0xDD, 0xE9


def jpegtran() -> str:
    """Returns the path of the program jpegtran. Raises ValueError if it isn't installed."""
    if path := shutil.which("jpegtran"):
        return path
    raise InputError(
        "restart markers are written by jpegtran, which is not on the PATH: install libjpeg-turbo "
        "(Debian, Ubuntu: libjpeg-turbo-progs; Fedora: libjpeg-turbo-utils; macOS: jpeg-turbo)"
    )


def add_markers(data: bytes) -> bytes | None:
    """Returns the same image with markers and index; None if it isn't a JPEG of 8 bits a channel.

    The result is a baseline JPEG with optimized Huffman tables. All metadata are kept.
    """
    if data[:2] != b"\xff\xd8":
        return None
    for marker, at, end in _segments(data):
        if marker in (*_SOF, _PROGRESSIVE) and end - at > 10:
            (_, width), (_, step) = _sizes(data, at)
            break
    else:
        return None
    if not width or not step:
        return None
    across = -(-width // step)
    even = [n for n in range(1, across + 1) if across % n == 0 and n * step >= _SPACING[0]]
    interval = max((n for n in even if n * step <= _SPACING[1]), default=even[0] if even else 1)
    command = [jpegtran(), "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    return None if done.returncode else add_index(done.stdout)  # non-zero after warnings, too


def orientation(data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if there is none.

    Raises ValueError for damaged EXIF data.
    """
    if data[:2] != b"\xff\xd8":
        return 1
    for marker, at, end in _segments(data):
        exif = data[at + 10 : end]
        if marker != _APP1 or data[at + 4 : at + 10] != b"Exif\0\0":
            continue
        order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
        try:
            if order is None:
                raise struct.error("no TIFF header")
            (start,) = struct.unpack_from(f"{order}I", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, start)
            for i in range(count):
                tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
                if tag == _ORIENTATION and kind == 3 and 1 <= value <= 8:
                    return value
        except struct.error as error:
            raise InputError(f"its EXIF data are damaged: {error}") from error
    return 1


def add_index(data: bytes) -> bytes | None:
    """Adds the index to a baseline JPEG; returns None unless restart markers divide each row."""
    frame, interval, start = None, 0, 0
    for marker, at, end in _segments(data):
        if marker in _SOF and end - at > 10:
            frame = (at, end)
        elif marker == _DRI:
            interval = int.from_bytes(data[at + 4 : at + 6])
        elif marker == _SOS:
            start = end
    # Accepts one scan, with nothing after it.
    if frame is None or not start or data.find(b"\xff\xd9", start) != len(data) - 2:
        return None
    if b"\xff\xda" in data[start:] or (grid := _grid(data, frame[0], interval)) is None:
        return None
    coded = np.frombuffer(data, np.uint8, offset=start)
    begins = np.flatnonzero((coded[:-1] == 0xFF) & (coded[1:] & 0xF8 == 0xD0)) + 2
    lengths = np.diff(begins, prepend=0, append=len(coded))
    rows, columns, _, _ = grid
    size = 2 + _HEAD.size + 2 * len(lengths)
    if len(lengths) != rows * columns or lengths.max() >= 1 << 16 or size >= 1 << 16:
        return None
    head = _HEAD.pack(_NAME, interval, start - frame[1])
    index = struct.pack(">BBH", 0xFF, _APP9, size) + head + lengths.astype("<u2").tobytes()
    return data[: frame[1]] + index + data[frame[1] :]


def cut(
    data: bytes, frame: int, box: tuple[int, int, int, int], margin: int
) -> tuple[bytearray, tuple[int, int], tuple[int, int]] | None:
    """Makes a JPEG of the segments that box (left, top, right, bottom) and a margin touch.

    Chroma is interpolated from neighbours. A margin of one decoded pixel therefore gives the same
    pixels as decoding the whole image.

    Args:
      data: a baseline JPEG.
      frame: byte offset of its SOF marker.
      box, margin: in pixels.

    Returns:
      The JPEG, its left and top edges, its height and width; None if data has no valid index, or if
      the whole image is needed.
    """
    index = frame + 2 + int.from_bytes(data[frame + 2 : frame + 4])
    if not data.startswith(_NAME, index + 4):
        return None
    after = index + 2 + int.from_bytes(data[index + 2 : index + 4])
    count, odd = divmod(after - index - 4 - _HEAD.size, 2)
    if count < 1 or odd or after > len(data):
        return None
    _, interval, distance = _HEAD.unpack_from(data, index + 4)
    lengths = np.frombuffer(data, "<u2", count, offset=after - 2 * count)
    start, ends = after + distance, lengths.cumsum(dtype=np.int64)
    if start + ends[-1] != len(data):
        return None
    if (grid := _grid(data, frame, interval)) is None or count != grid[0] * grid[1]:
        return None
    rows, columns, step_y, step_x = grid
    (height, width), _ = _sizes(data, frame)
    left, top = max(box[0] - margin, 0) // step_x, max(box[1] - margin, 0) // step_y
    right = min(-(-(box[2] + margin) // step_x), columns)
    bottom = min(-(-(box[3] + margin) // step_y), rows)
    if (bottom - top, right - left) == (rows, columns):
        return None

    lengths, ends = lengths.reshape(rows, columns), ends.reshape(rows, columns) + start
    from_ = (ends[top:bottom, left] - lengths[top:bottom, left]).tolist()
    to = ends[top:bottom, right - 1].tolist()
    size = (
        min(bottom * step_y, height) - top * step_y,
        min(right * step_x, width) - left * step_x,
    )
    head = bytearray(data[:index] + data[after:start])
    struct.pack_into(">HH", head, frame + 5, *size)
    kept = memoryview(data)
    part = bytearray().join([head, *(kept[a:b] for a, b in zip(from_, to, strict=True))])
    codes = np.frombuffer(part, np.uint8)
    marks = lengths[top:bottom, left:right].cumsum(dtype=np.int64) + (len(head) - 1)
    if (codes[marks[:-1]] & 0xF8 != 0xD0).any():
        return None  # the file was changed without its index
    codes[marks] = _CYCLE[: len(marks)]  # restart markers are numbered modulo 8
    part[-1] = _EOI
    return part, (left * step_x, top * step_y), size


_CYCLE = np.resize(np.arange(0xD0, 0xD8, dtype=np.uint8), 1 << 15)


def _segments(data: bytes, at: int = 2) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment, up to and including the first SOS."""
    marker = 0
    while marker != _SOS and at + 4 < len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8) + data[at + 3]
        if end > len(data):
            return
        yield marker, at, end
        at = end


def _sizes(data: bytes, frame: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns height and width of the image, and of an MCU (minimum coded unit)."""
    height, width, components = struct.unpack_from(">HHB", data, frame + 5)
    factors = data[frame + 11 : frame + 11 + 3 * components : 3]
    if components < 2 or not factors:  # one block, whatever the factors
        return (height, width), (8, 8)
    return (height, width), (8 * max(f & 15 for f in factors), 8 * max(f >> 4 for f in factors))


def _grid(data: bytes, frame: int, interval: int) -> tuple[int, int, int, int] | None:
    """Returns rows and columns of segments, a segment's height and width; None if not a grid."""
    (height, width), (step_y, step_x) = _sizes(data, frame)
    if not interval or not step_y or not step_x or not height or -(-width // step_x) % interval:
        return None
    return -(-height // step_y), -(-width // (step_x * interval)), step_y, step_x * interval

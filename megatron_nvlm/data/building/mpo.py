"""MPO, by which telephones and stereo cameras store several JPEGs in one file: the first of them, byte for byte."""

import re

from megatron_nvlm.image.pixels import read_header

_START_OF_SCAN, _END_OF_IMAGE, _APP2 = 0xDA, 0xD9, 0xE2
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
_LIST_OF_FRAMES = b"MPF\0"
_BEHIND_A_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
"""The next marker: within a scan 0xFF is followed by zero or by a restart marker."""


def first_picture(data: bytes) -> bytes:
    """Of an MPO the JPEG of its first picture; any other file as it is.

    The pictures after it (previews, depth, gain maps) and the list of them are left out; its own data, EXIF and colour
    profile stay as they are. If its end is not found, which readers of JPEG may pass over, the file is left as it is.

    Raises:
        UserError: it is no image.
    """
    segments = _segments_of_first(data) if read_header(data).format == "MPO" else None
    return b"".join(segments) if segments else data


def _segments_of_first(data: bytes) -> list[bytes] | None:
    """Those of the first JPEG but the list of frames; None if one of them breaks off."""
    kept, place = [data[:2]], 2
    while place + 1 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == _END_OF_IMAGE:
            return [*kept, data[place : place + 2]]
        end = place + 2
        if marker not in _WITHOUT_LENGTH:
            end += int.from_bytes(data[end : end + 2], "big")
        if marker == _START_OF_SCAN:
            behind = _BEHIND_A_SCAN.search(data, end)
            end = behind.start() if behind else len(data)
        if not (marker == _APP2 and data.startswith(_LIST_OF_FRAMES, place + 4)):
            kept.append(data[place:end])
        place = end
    return None

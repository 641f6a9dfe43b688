"""Makes images and tars, valid and broken ones, for tests of sources."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def noise(height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image=None, kind="jpeg", **options):
    """The bytes of an array or Pillow image."""
    file = io.BytesIO()
    image = noise() if image is None else image
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def rotated(kind="jpeg", orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(kind=kind, exif=exif)


def animated(kind="webp"):
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def chunks_of(png):
    """The chunks of a PNG, (type, data)."""
    place, chunks = 8, []
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        chunks.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + size]))
        place += 12 + size
    return chunks


def png_of(chunks):
    """A PNG of chunks, with their checksums."""
    sealed = [struct.pack(">I", len(data)) + kind + data for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(one + struct.pack(">I", zlib.crc32(one[4:])) for one in sealed)


def with_size(png, width, height):
    """A PNG whose header, with the right checksum, says another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def member(name, data=b"", kind=tarfile.REGTYPE, **fields):
    """(header, data) for `tar_of`."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def sample(key, image=None, text="a caption", /, extension="jpg", **fields):
    """The members of one record: image, text, and JSON if there are fields for it."""
    members = [member(f"{key}.{extension}", encoded() if image is None else image)]
    if text is not None:
        members.append(member(f"{key}.txt", text if isinstance(text, bytes) else text.encode()))
    if fields:
        members.append(member(f"{key}.json", json.dumps(fields).encode()))
    return members


def tar_of(*members, form=tarfile.GNU_FORMAT):
    """The bytes of a tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()

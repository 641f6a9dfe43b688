"""Tests a thousand damaged tars and images: each record equals the decoder's result, or has a reason."""

import io
import random
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ecdit.data import quarantine
from ecdit.data.images import ImageRejected, decode
from ecdit.data.reasons import entry
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.sources.tars import Tars
from tests.data.broken import animated, encoded, member, noise, rotated, sample, tar_of, with_size

CASES = 1000
MAX_PIXELS = 1 << 16
MAX_MEMORY = 8 << 20  # bytes that Python and NumPy may take for one tar of some 20 KB

IMAGES = [encoded(noise(12, 9, seed=seed), kind) for seed, kind in enumerate(("jpeg", "png", "webp") * 2)]
UGLY = [
    rotated(),
    animated("webp"),
    animated("png"),
    encoded(Image.new("CMYK", (8, 8))),
    encoded(noise(8, 8, 4), "png"),
    encoded(Image.fromarray(noise(8, 8)).quantize(8), "png", transparency=1),
    with_size(IMAGES[1], 1 << 20, 1 << 20),
    with_size(IMAGES[1], 0, 9),
    with_size(IMAGES[1], 200, 200),
    encoded(kind="gif"),
    b"",
]
NAMES = ["/root/a", "../../a", "a/../../b", "\udcff", "\x1b[31m", "ß" * 120, ".hidden", "a\nb", "0", "1"]


def flipped(data, draw, bits=4):
    damaged = bytearray(data)
    for _ in range(draw.randint(1, bits) if damaged else 0):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(data, draw):
    return data[: draw.randint(0, len(data))]


def any_image(draw):
    data = draw.choice(IMAGES if draw.random() < 0.5 else UGLY)
    return draw.choice([lambda: data, lambda: flipped(data, draw), lambda: cut(data, draw)])()


def any_member(draw):
    """A member that a downloaded tar should not have."""
    name = f"{draw.choice(NAMES)}.{draw.choice(['jpg', 'txt', 'json', 'png'])}"
    kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.XHDTYPE]
    kinds += [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE, tarfile.DIRTYPE, b"Z"]
    pax = {"GNU.sparse.major": "1"} if draw.random() < 0.2 else {}
    return member(name, draw.randbytes(draw.randint(0, 900)), draw.choice(kinds), linkname="/etc", pax_headers=pax)


def damaged_tar(draw):
    """A tar of a few records with one or several kinds of damage."""
    members = []
    for key in range(draw.randint(1, 5)):
        text = draw.choice([*["a caption", "ß" * 40] * 4, "", b"\xff", None])
        fields = draw.choice([*[{}, {"aesthetic": draw.random()}, {"re_caption": "x"}] * 3, {"caption": "\ud800"}])
        extension = draw.choice(["jpg", "png", "webp"])  # whatever the bytes are
        members += sample(str(key), any_image(draw), text, extension=extension, **fields)
    if draw.random() < 0.3:
        members += [any_member(draw) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.2:
        members += sample("0", draw.choice(IMAGES))
    if draw.random() < 0.2:
        members.append(member("deep.json", b'{"a":' * 2000))
    if draw.random() < 0.4:
        draw.shuffle(members)
    data = tar_of(*members, form=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    if draw.random() < 0.3:
        data = flipped(data, draw, bits=20)
    if draw.random() < 0.3:
        place = draw.randrange(0, len(data), 512)
        data = data[:place] + draw.choice([bytes(512), draw.randbytes(512), b""]) + data[place + 512 :]
    return cut(data, draw) if draw.random() < 0.2 else data


def pillow_alone(data):
    """What Pillow makes of bytes, without any of our checks."""
    with Image.open(io.BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))


def check(record, tar):
    """Returns the record, or the Rejected of its image, after comparing it with what Pillow alone decodes."""
    if isinstance(record, Rejected):
        return record
    assert record.image in tar  # the bytes of a member, as they are
    assert record.captions
    assert all(text.strip() for text in record.captions.values())
    "".join([record.key, *record.captions.values(), *map(str, record.columns.values())]).encode()
    try:
        pixels = decode(record.image, "", MAX_PIXELS)
    except ImageRejected as error:
        return Rejected(record.key, error.reason, error.detail)
    assert (pixels == pillow_alone(record.image)).all()
    return record


def test_a_thousand_damaged_tars(tmp_path):
    path = tmp_path / "00000.tar"
    source, pairs, largest = Tars(str(path)), 0, 0
    path.write_bytes(b"")
    tracemalloc.start()
    try:
        with quarantine.Quarantine(tmp_path / "quarantine") as rejected:
            for seed in range(CASES):
                tar = damaged_tar(random.Random(seed))
                path.write_bytes(tar)
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                for record in source.read("00000.tar"):
                    found = check(record, tar)
                    if isinstance(found, Pair):
                        pairs += 1
                    else:
                        rejected.add(found)
                largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert largest < MAX_MEMORY
    assert pairs > CASES // 4  # the damage leaves something
    assert sum(rejected.counts.values()) > CASES
    assert {"damaged tar", "unsafe name", "duplicate member", "not a file", "sparse member"} <= set(rejected.counts)
    data = (tmp_path / "quarantine").read_bytes()
    assert set(data) <= {*range(0x20, 0x7F), 0x0A}
    assert len(list(quarantine.read(tmp_path / "quarantine"))) == sum(rejected.counts.values())


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_thousand_damaged_images(kind):
    whole, reasons = encoded(noise(24, 17), kind), set()
    for seed in range(CASES // 3 + 1):
        draw = random.Random(f"{kind}{seed}")
        data = draw.choice([flipped, cut])(whole, draw)
        try:
            pixels = decode(data, "", MAX_PIXELS)
        except ImageRejected as error:
            reasons.add(entry(error.reason))
        else:
            assert (pixels == pillow_alone(data)).all()
    assert reasons & {"truncated", "undecodable"}

"""Tests a thousand damaged tars and images: each record equals the decoder's result, or has a reason.

In these tars a record's captions are its key, and its image ends with it, so that a wrong pair shows.
"""

import dataclasses
import io
import random
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ecdit.data import quarantine
from ecdit.data.images import ImageRejected, decode, decode_stored, fit_square
from ecdit.data.parts import read_summary, write_part
from ecdit.data.reasons import entry
from ecdit.data.record import decode_record
from ecdit.data.shards import ShardReader
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.sources.tars import Tars
from tests.data.broken import animated, chunks_of, encoded, member, noise, png_of, rotated, sample, tar_of, with_size
from tests.data.example import make_config

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of `pillow_alone`
CASES = 1000
PREPARED = 20  # every twentieth tar is prepared too
PART, SIDE = "00000.tar", 8
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
NAMES = ["/root/a", "../../a", "a/../../b", "\udcff", "\x1b[31m", "ß" * 120, ".hidden", "a\nb", "0"]
_RGB = Image.fromarray(noise(24, 17))
# Of each format: every kind of colour, with and without transparent pixels.
WHOLE = {
    "jpeg": [encoded(_RGB), encoded(_RGB.convert("L")), encoded(_RGB, progressive=True)],
    "png": [
        *(encoded(_RGB.convert(mode), "png") for mode in ("RGB", "RGBA", "L", "LA", "1")),
        *(encoded(_RGB.quantize(8), "png", **options) for options in ({}, {"transparency": 1})),
        encoded(_RGB.quantize(2), "png", transparency=bytes([1, 200])),
        encoded(_RGB.convert("L"), "png", transparency=3),
    ],
    "webp": [encoded(_RGB, "webp"), encoded(Image.fromarray(noise(24, 17, 4)), "webp", lossless=True)],
}


def flipped(data, draw, bits=4):
    damaged = bytearray(data)
    for _ in range(draw.randint(1, bits) if damaged else 0):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(data, draw):
    return data[: draw.randint(0, len(data))]


def resealed(png, draw):
    """A PNG with damaged chunks and right checksums, so that the decoder gets to see the damage."""
    chunks = chunks_of(png)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(chunks))
        kind, data = chunks[place]
        changed = [
            [],
            [(kind, data), draw.choice(chunks)],
            [(kind, flipped(data, draw))],
            [(kind, cut(data, draw))],
        ]
        chunks[place : place + 1] = draw.choice(changed[1:] if len(chunks) < 3 else changed)
    return png_of(chunks)


def any_image(draw):
    data = draw.choice(IMAGES if draw.random() < 0.5 else UGLY)
    damage = [lambda: data, lambda: flipped(data, draw), lambda: cut(data, draw)]
    return draw.choice([*damage, lambda: resealed(draw.choice(WHOLE["png"]), draw)])()


def any_member(draw, keys):
    """A member that a downloaded tar should not have."""
    key = draw.choice([*NAMES, keys[0], keys[-1]])
    data = key.encode() if key in keys else draw.randbytes(draw.randint(0, 900))
    name = f"{key}.{draw.choice(['jpg', 'txt', 'json', 'png'])}"
    kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.XHDTYPE]
    kinds += [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE, tarfile.DIRTYPE, b"Z"]
    pax = {"GNU.sparse.major": "1"} if draw.random() < 0.2 else {}
    return member(name, data, draw.choice(kinds), linkname="/etc", pax_headers=pax)


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A tar whose members are awkward, and whose bytes may be damaged too."""

    tar: bytes
    keys: tuple[str, ...]  # of its records
    changed: bool  # the bytes are: a caption may have another letter
    moved: bool  # a block is gone, so that the next header may stand where a caption stood: nothing can tell


def damaged_tar(draw):
    """A tar of a few records with one or several kinds of damage."""
    keys = [f"{draw.getrandbits(32):08x}{draw.choice(['', 'ß'])}" for _ in range(draw.randint(1, 5))]
    members = []
    for key in keys:
        text = draw.choice([*[key, f" {key}\n"] * 4, "", b"\xff", None])
        fields = [{}, {"aesthetic": draw.random()}, {"re_caption": key}, {"captions": [key, " "]}, {"caption": key}]
        extra = draw.choice([*fields * 2, {"caption": "\ud800"}])
        extension = draw.choice(["jpg", "png", "webp"])  # whatever the bytes are
        members += sample(key, any_image(draw) + key.encode(), text, extension=extension, **extra)
    if draw.random() < 0.3:
        members += [any_member(draw, keys) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.2:
        members += sample(keys[0], draw.choice(IMAGES) + keys[0].encode(), keys[0])
    if draw.random() < 0.2:
        members.append(member("deep.json", b'{"a":' * 2000))
    if draw.random() < 0.4:
        draw.shuffle(members)
    whole = data = tar_of(*members, form=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    if draw.random() < 0.3:
        data = flipped(data, draw, bits=20)
    if draw.random() < 0.3:
        place = draw.randrange(0, len(data), 512)
        data = data[:place] + draw.choice([bytes(512), draw.randbytes(512), b""]) + data[place + 512 :]
    moved = len(data) < len(whole)
    data = cut(data, draw) if draw.random() < 0.2 else data
    return Damaged(data, tuple(keys), data != whole, moved)


def pillow_alone(data, background=""):
    """What Pillow makes of bytes, without any of our checks."""
    with Image.open(io.BytesIO(data)) as file:
        if not background:
            return np.asarray(file.convert("RGB"))
        image = file.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB"))


def check_pair(pair, damaged):
    """The captions and the image of a pair belong to its key."""
    assert pair.image in damaged.tar  # the bytes of a member, as they are
    assert pair.captions
    assert all(text.strip() for text in pair.captions.values())
    "".join([pair.key, *pair.captions.values(), *map(str, pair.columns.values())]).encode()
    end = pair.image[-len(damaged.keys[0].encode()) - 2 :].decode(errors="replace")
    if pair.key in damaged.keys and not damaged.changed:
        assert set(pair.captions.values()) == {pair.key}
        assert end.endswith(pair.key)
    if not damaged.moved:
        seen = {key for key in damaged.keys for text in (*pair.captions.values(), end) if key in text}
        assert seen <= {pair.key} if pair.key in damaged.keys else len(seen) <= 1  # a key may have another letter too


def check_image(pair):
    """Returns the pair, or the Rejected of its image, after comparing it with what Pillow alone decodes."""
    try:
        pixels = decode(pair.image, "", MAX_PIXELS)
    except ImageRejected as error:
        return Rejected(pair.key, error.reason, error.detail)
    assert (pixels == pillow_alone(pair.image)).all()
    return pair


def check_prepared(pairs, source, background, place):
    """Prepares a tar. Each of its pairs is a record with its captions and Pillow's pixels, or is in the quarantine."""
    config = make_config(image_size=SIDE, prepare={"background": background, "max_pixels": MAX_PIXELS})
    write_part(config, source.read(PART), PART, "", place)
    left = {pair.key: pair for pair in pairs}
    for shard in read_summary(place).shards:
        reader = ShardReader(place.parent, [shard])
        for record in (decode_record(reader[i]) for i in range(len(reader))):
            pair = left.pop(record.key)
            pixels = pillow_alone(pair.image, background)
            assert record.captions == pair.captions
            assert record.original_size.tolist() == list(pixels.shape[:2])
            assert (decode_stored(record.image) == fit_square(pixels, SIDE)[0]).all()
    assert {f"{PART}:{key}" for key in left} <= {one.name for one in quarantine.read(place / "quarantine.jsonl")}


def test_a_thousand_damaged_tars(tmp_path):
    path = tmp_path / PART
    path.write_bytes(b"")
    source, pairs, largest = Tars(str(path)), 0, 0
    with path.open("r+b") as file, quarantine.Quarantine(tmp_path / "quarantine") as rejected:
        for seed in range(CASES):
            damaged = damaged_tar(random.Random(seed))
            file.seek(0)
            file.write(damaged.tar)
            file.truncate()
            file.flush()
            tracemalloc.start()
            try:
                found = list(source.read(PART))
                for one in found:
                    if isinstance(one, Pair):
                        check_pair(one, damaged)
                        one = check_image(one)
                    if isinstance(one, Rejected):
                        rejected.add(one)
                    else:
                        pairs += 1
                if seed % PREPARED == 0:
                    kept = [one for one in found if isinstance(one, Pair)]
                    check_prepared(kept, source, ("", "white")[seed // PREPARED % 2], tmp_path / str(seed))
                largest = max(largest, tracemalloc.get_traced_memory()[1])
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
    reasons, pixels_seen = set(), 0
    for seed in range(CASES):
        draw = random.Random(f"{kind}{seed}")
        background = draw.choice(["", "white"])
        damage = draw.choice([flipped, cut] if kind != "png" else [flipped, cut, *[resealed] * 4])
        data = damage(draw.choice(WHOLE[kind]), draw)
        try:
            pixels = decode(data, background, MAX_PIXELS)
        except ImageRejected as error:
            reasons.add(entry(error.reason))
        else:
            pixels_seen += 1
            assert (pixels == pillow_alone(data, background)).all()
    assert reasons & {"truncated", "undecodable"}
    assert pixels_seen > CASES // 100

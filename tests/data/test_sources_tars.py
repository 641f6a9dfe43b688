"""Tests tars: every record is complete or rejected for one reason, and no damage is silent."""

import gzip
import io
import os
import pickle
import tarfile
import tracemalloc

import pytest

from ecdit.data import DataError
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.sources.tars import Tars
from tests.data.broken import encoded, member, sample, tar_of

IMAGE = encoded()


def refuse_b(pair):
    return pair.key != "b"


def fail(pair):
    raise KeyError("aesthetic")


@pytest.fixture
def write(tmp_path):
    """Writes tars by name and returns their source."""

    def write(options=None, **tars):
        for name, data in tars.items():
            (tmp_path / f"{name}.tar").write_bytes(data)
        return Tars(str(tmp_path / "*.tar"), **(options or {}))

    return write


def read(source):
    """The pairs by key and the rejected, of all parts."""
    found = [record for part in source.parts() for record in source.read(part)]
    rejected = [record for record in found if isinstance(record, Rejected)]
    return {pair.key: pair for pair in found if isinstance(pair, Pair)}, rejected


def only(source, reason):
    """The one rejected record's name; nothing else is rejected."""
    _, rejected = read(source)
    assert [record.reason for record in rejected] == [reason], rejected
    return rejected[0].name


def test_a_record_is_image_text_and_json(write):
    fields = {"re_caption": " two ", "aesthetic": 5.5, "width": 8, "NSFW": "no", "ok": True, "md5": None, "exif": {}}
    pairs, rejected = read(write(a=tar_of(*sample("000", IMAGE, "one", **fields))))
    assert rejected == []
    columns = {"aesthetic": 5.5, "width": 8, "NSFW": "no", "ok": True, "md5": None}
    assert pairs == {"000": Pair("000", IMAGE, {"caption": "one", "re_caption": "two"}, columns)}


@pytest.mark.parametrize(
    ("text", "fields", "captions"),
    [
        ("text", {"caption": "json"}, {"caption": "json"}),
        ("text", {"caption": None}, {"caption": "text"}),
        ("text", {"caption": " "}, {"caption": "text"}),
        ("text", {"caption": ["a", "b"]}, {"caption.0": "a", "caption.1": "b"}),
        (None, {"captions": ["a", "", "c"], "title": "t"}, {"captions.0": "a", "captions.2": "c", "title": "t"}),
        ("t", {"captions": ["a", None, 3, "c"]}, {"caption": "t", "captions.0": "a", "captions.3": "c"}),
        ("t", {"caption": [None]}, {"caption": "t"}),
        ("t", {"caption": ["", " "]}, {"caption": "t"}),
        ("t", {"caption": [None, "a"]}, {"caption.1": "a"}),
        (None, {"org_caption": "a", "other": "b"}, {"org_caption": "a"}),
    ],
)
def test_captions_by_field(write, text, fields, captions):
    pairs, _ = read(write({"captions": ("title",)}, a=tar_of(*sample("0", IMAGE, text, **fields))))
    assert pairs["0"].captions == captions


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_extensions_of_images(write, extension):
    assert list(read(write(a=tar_of(*sample("0", IMAGE, extension=extension))))[0]) == ["0"]


def test_the_key_ends_at_the_first_dot_of_the_last_part(write):
    source = write(a=tar_of(*sample("./a.b/c", IMAGE), *sample("d/c", IMAGE), member("d/c.seg.png", b"ignored")))
    assert list(read(source)[0]) == ["a.b/c", "d/c"]


def test_members_may_be_out_of_order_and_far_apart(write):
    members = [made for key in "abc" for made in sample(key, IMAGE, f"caption {key}")]
    pairs, rejected = read(write(a=tar_of(*[members[place] for place in (4, 1, 3, 0, 5, 2)])))
    assert rejected == []
    assert {key: pair.captions["caption"] for key, pair in pairs.items()} == {key: f"caption {key}" for key in "cab"}
    assert list(pairs) == ["c", "a", "b"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_any_language_work(write, form):
    key = "ß" * 90 + "/" + "中文" * 60
    assert list(read(write(a=tar_of(*sample(key, IMAGE), *sample("b", IMAGE), form=form)))[0]) == [key, "b"]


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "\udcff.jpg", ".hidden", "a/.jpg"])
def test_unsafe_names(write, name):
    source = write(a=tar_of(member(name, IMAGE), *sample("b", IMAGE)))
    assert only(source, "unsafe name") == f"a.tar:{name}"
    assert list(read(source)[0]) == ["b"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(write, kind):
    image = member("a.jpg", kind=kind, linkname="/etc/passwd")
    assert only(write(a=tar_of(image, member("a.txt", b"text"))), "not a file") == "a.tar:a"


def test_folders_are_no_records(write):
    assert read(write(a=tar_of(member("d", kind=tarfile.DIRTYPE), *sample("d/a", IMAGE))))[1] == []


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members(write, form):
    if form == "pax":
        image = member("a.jpg", IMAGE, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        data = tar_of(image, *sample("b", IMAGE), form=tarfile.PAX_FORMAT)
    else:
        data = bytearray(tar_of(member("a.jpg", IMAGE), *sample("b", IMAGE)))
        data[156:157] = tarfile.GNUTYPE_SPARSE
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    source = write(a=bytes(data))
    assert only(source, "sparse member") == "a.tar:a"
    assert list(read(source)[0]) == ["b"]


def test_duplicates_spoil_their_record(write):
    source = write(a=tar_of(*sample("a", IMAGE, "one"), *sample("a", IMAGE, "two"), *sample("b", IMAGE)))
    assert only(source, "duplicate member") == "a.tar:a"
    both = write(a=tar_of(*sample("a", IMAGE), member("a.png", IMAGE)))
    assert only(both, "duplicate member") == "a.tar:a"


def test_large_members_are_not_read(write):
    data = tar_of(member("a.jpg", bytes(8 << 20)), member("a.txt", b"t"), *sample("b", IMAGE))
    source = write({"max_member_bytes": 1 << 20}, a=data)
    tracemalloc.start()
    try:
        assert only(source, "too large") == "a.tar:a"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_text_has_a_limit_of_its_own(write):
    assert only(write(a=tar_of(*sample("a", IMAGE, "x" * (5 << 20)))), "too large") == "a.tar:a"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([member("a.txt", b"text")], "no image"),
        ([member("README", b"text")], "no image"),
        ([member("a.jpg", IMAGE)], "no caption"),
        (sample("a", IMAGE, None, width=8), "no caption"),
        (sample("a", IMAGE, None, caption=5), "no caption"),
        (sample("a", IMAGE, " \n"), "empty caption"),
        (sample("a", IMAGE, "", re_caption=""), "empty caption"),
        (sample("a", IMAGE, b"\xff\xfe"), "not UTF-8"),
        ([*sample("a", IMAGE), member("a.json", b'{"x": "\xff"}')], "not UTF-8"),
        ([*sample("a", IMAGE), member("a.json", b'{"re_caption": "\\ud800"}')], "not UTF-8"),
        ([*sample("a", IMAGE), member("a.json", b'{"x": "\\ud800"}')], "not UTF-8"),
        ([*sample("a", IMAGE), member("a.json", b"{")], "bad JSON"),
        ([*sample("a", IMAGE), member("a.json", b'["a"]')], "bad JSON"),
        ([*sample("a", IMAGE), member("a.json", b'{"a":' * 100_000)], "bad JSON"),
        ([*sample("a", IMAGE), member("a.json", b'{"a": 1' + b"0" * 10_000 + b"}")], "bad JSON"),
    ],
)
def test_records_that_are_rejected(write, members, reason):
    source = write(a=tar_of(*members, *sample("good", IMAGE)))
    assert only(source, reason).startswith("a.tar:")
    assert list(read(source)[0]) == ["good"]


def test_a_damaged_header_does_not_end_the_tar(write):
    data = bytearray(tar_of(*sample("a", IMAGE), *sample("b", IMAGE), *sample("c", IMAGE)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        place = tar.getmember("b.jpg").offset
    data[place] ^= 1
    pairs, rejected = read(write(a=bytes(data)))
    assert list(pairs) == ["a", "c"]
    assert [(record.name, record.reason) for record in rejected] == [("a.tar", "damaged tar"), ("a.tar:b", "no image")]
    assert f"bytes {place} to {place + 512 + -(-len(IMAGE) // 512) * 512}" in rejected[0].detail


def test_zeros_in_the_middle_do_not_end_the_tar(write):
    data = bytearray(tar_of(*sample("a", IMAGE), *sample("b", IMAGE), *sample("c", IMAGE)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        begin, end = tar.getmember("b.jpg").offset, tar.getmember("c.jpg").offset
    data[begin:end] = bytes(end - begin)
    pairs, rejected = read(write(a=bytes(data)))
    assert list(pairs) == ["a", "c"]
    assert [record.reason for record in rejected] == ["damaged tar"]


def test_a_tar_that_ends_early_says_so(write):
    whole = tar_of(*sample("a", IMAGE), *sample("b", IMAGE))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        header, data = tar.getmember("b.jpg").offset, tar.getmember("b.jpg").offset_data
    assert only(write(a=whole[: data + 3]), "damaged tar") == "a.tar:b"
    assert only(write(a=whole[: header + 3]), "damaged tar") == "a.tar"
    assert only(write(a=whole[:header]), "damaged tar") == "a.tar"
    assert only(write(a=b""), "damaged tar") == "a.tar"
    assert list(read(write(a=whole[:header]))[0]) == ["a"]


def test_what_is_no_tar_says_so(write):

    assert only(write(a=os.urandom(5000)), "damaged tar") == "a.tar"
    _, (rejected,) = read(write(a=gzip.compress(tar_of(*sample("a", IMAGE)))))
    assert "gzip" in rejected.detail


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_false_size_of_an_extended_header_takes_no_memory(write, kind):
    info, _ = member("pax", kind=kind)
    info.size = 1 << 40
    tracemalloc.start()
    try:
        pairs, rejected = read(write(a=info.tobuf(tarfile.GNU_FORMAT) + tar_of(*sample("a", IMAGE))))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert list(pairs) == ["a"]
    assert [record.reason for record in rejected] == ["damaged tar"]


@pytest.mark.parametrize("pax", [b"junk", b"9999 path=a\n", b"11 path=abc", b"8 pathab\n", b"0 a=b\n"])
def test_an_extended_header_that_cannot_be_parsed_is_damage(write, pax):
    data = tar_of(member("pax", pax, kind=tarfile.XHDTYPE), *sample("a", IMAGE))
    assert only(write(a=data), "damaged tar") == "a.tar"


def test_parts_are_tars_or_groups_of_them(write):
    source = write({"tars_per_part": 2}, **{name: tar_of(*sample(name, IMAGE)) for name in "abc"})
    assert source.parts() == ("a.tar..b.tar", "c.tar")
    assert list(read(source)[0]) == ["a", "b", "c"]
    assert pickle.loads(pickle.dumps(source)).parts() == source.parts()


def test_the_stamp_changes_with_the_files(write, tmp_path):
    source = write(a=tar_of(*sample("a", IMAGE)), b=tar_of(*sample("b", IMAGE)))
    first = [source.stamp(part) for part in source.parts()]
    os.utime(tmp_path / "b.tar", ns=(1, 1))
    second = [source.stamp(part) for part in source.parts()]
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_predicate_rejects(write):
    source = write({"keep": refuse_b}, a=tar_of(*sample("a", IMAGE), *sample("b", IMAGE)))
    assert only(source, "predicate") == "a.tar:b"


def test_a_predicate_that_raises_ends_the_preparation_and_names_the_key(write):
    with pytest.raises(DataError, match=r"KeyError for key 'a' \(a.tar:a\)"):
        read(write({"keep": fail}, a=tar_of(*sample("a", IMAGE))))


def test_a_pattern_without_files_is_named(write, tmp_path):
    with pytest.raises(DataError, match=r"no tar is named like .*tar"):
        write().parts()
    with pytest.raises(DataError, match="tars_per_part = 0"):
        write({"tars_per_part": 0}).parts()
    with pytest.raises(DataError, match=r"no part 'b.tar'"):
        list(write(a=tar_of()).read("b.tar"))

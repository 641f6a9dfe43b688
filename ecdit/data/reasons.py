"""Lists every reason for which a record of a source is rejected; docs/data_sources.md repeats the table.

Sources, images and filters name a reason from here, so that counts of two preparations can be compared.
"""

# NAME stands for the name of a column in the config.
REASONS: dict[str, str] = {
    # Archives and tables.
    "damaged tar": "bytes of a tar that are no member: skipped up to the next valid header, or missing at its end",
    "unsafe name": "a name that is absolute, leaves its folder, is empty, or is not UTF-8",
    "not a file": "a link, a device, a pipe or a folder in the place of a file",
    "sparse member": "a tar member that is stored as pieces with holes",
    "too large": "a file of more bytes than the source allows",
    "duplicate member": "two members of one key that are both its image, its text or its JSON",
    "bad row": "a table row that cannot be parsed or has another number of fields than the header",
    "bad JSON": "JSON that cannot be parsed, is nested too deeply, or is no object",
    "not UTF-8": "text that is not UTF-8, or has lone surrogates, which UTF-8 cannot write",
    "no image": "a record without an image, or whose image file does not exist",
    "no caption": "a record without any caption field",
    "empty caption": "a record whose captions are all empty or white space",
    "predicate": "the source's `keep` returned false",
    # Images.
    "unknown format": "bytes that are no JPEG, PNG or WebP image",
    "undecodable": "an image that its decoder refuses, or a PNG with a wrong checksum",
    "truncated": "an image that ends early",
    "zero-sized": "an image without pixels",
    "too many pixels": "an image of more pixels than allowed, by its header; it is not decoded",
    "colour mode": "CMYK, 16-bit greyscale, 16-bit RGB with a transparent colour, and others that are not converted; "
    "an array that is no uint8[H, W, 3]",
    "transparency": "transparent pixels, and no background to put them on",
    "animated": "several frames",
    "orientation": "an EXIF orientation other than upright, or EXIF that cannot be read",
    # Filters.
    "too small": "a shorter side below the minimum",
    "aspect ratio": "a longer side of too many shorter ones",
    "caption too short": "a caption of fewer characters than the minimum",
    "caption too long": "a caption of more characters than the maximum",
    "no column NAME": "no number in a column that is filtered by",
    "column NAME": "a number outside the range of its column",
}

_NO_COLUMN, _COLUMN = "no column ", "column "


def no_column(name: str) -> str:
    """Returns the reason "no column NAME" of a column."""
    return _NO_COLUMN + name


def column_out_of_range(name: str) -> str:
    """Returns the reason "column NAME" of a column."""
    return _COLUMN + name


def entry(reason: str) -> str:
    """Returns the key of REASONS that a reason belongs to: the reason itself, unless it names a column.

    Raises:
      ValueError: the reason is not in the table.
    """
    for prefix in (_NO_COLUMN, _COLUMN):
        if reason.startswith(prefix):
            return f"{prefix}NAME"
    if reason not in REASONS:
        raise ValueError(f"reason {reason!r} is not in ecdit.data.reasons.REASONS")
    return reason

"""Fetches the npm packages of nine emoji sets, at fixed versions.

Iconify publishes each set as a package of JSON: `icons.json` has the SVG of every icon, `info.json` its author and
licence. This project runs no code from them.
"""

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from ecdit.data import DataError
from ecdit.files import writing

ICONS, INFO, PACKAGE = "icons.json", "info.json", "package.json"
COMMAND = "python -m ecdit.fetch_emoji_styles"
_MEMBERS = (ICONS, INFO, PACKAGE)


@dataclasses.dataclass(frozen=True)
class Style:
    """A set of emoji of one style."""

    name: str  # as captions write it
    version: str  # version of the package @iconify-json/<style>
    sha512: str  # sha512 of its tarball in base64, as npm registries state it


# Keys are the packages' names. Another version is another dataset.
STYLES = {
    "noto": Style(
        "Noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "openmoji": Style(
        "OpenMoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
    "twemoji": Style(
        "Twemoji", "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="
    ),
    "fluent-emoji": Style(
        "Fluent", "1.2.7", "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="
    ),
    "fluent-emoji-flat": Style(
        "Fluent Flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "fluent-emoji-high-contrast": Style(
        "Fluent High Contrast",
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
    "noto-v1": Style(
        "Noto v1", "1.2.5", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="
    ),
    "emojione": Style(
        "EmojiOne", "1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="
    ),
    "emojione-v1": Style(
        "EmojiOne v1",
        "1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
    ),
}


def fetch(out: Path, say: Callable[[str], None] = print, styles: dict[str, Style] = STYLES) -> None:
    """Fetches the missing sets into `out`/<style>/. A set appears only when it is complete.

    npm downloads them from its configured registry; this function checks every tarball's sha512.

    Raises:
      DataError: npm is missing or fails, or a tarball is not the expected one.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, style in styles.items():
        target = out / name
        if is_fetched(target, style):
            say(f"{target} is there")
            continue
        with writing(target), tempfile.TemporaryDirectory(dir=out, prefix=".") as scratch:
            tarball = _packed(f"@iconify-json/{name}@{style.version}", Path(scratch))
            _unpack(tarball, style, Path(scratch) / name)
            if target.exists():  # it has another version, or is damaged
                shutil.rmtree(target)
            os.rename(Path(scratch) / name, target)
        licence = read_info(target)["license"]
        say(f"{target}: version {style.version}, {licence['title']}")


def is_fetched(directory: Path, style: Style) -> bool:
    """Returns whether a directory holds the set at the style's version."""
    try:
        version = json.loads((directory / PACKAGE).read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return version == style.version and all((directory / name).is_file() for name in _MEMBERS)


def read_info(directory: Path) -> dict:
    """Returns the author and licence of a fetched set, as Iconify states them."""
    return json.loads((directory / INFO).read_text(encoding="utf-8"))


def _packed(package: str, scratch: Path) -> Path:
    """Returns the tarball that npm wrote into `scratch`."""
    command = ["npm", "pack", "--ignore-scripts", "--silent", f"--pack-destination={scratch}", package]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError("fetching the emoji styles needs npm, which comes with Node.js: install it first") from None
    tarballs = list(scratch.glob("*.tgz"))
    if result.returncode or len(tarballs) != 1:
        said = " ".join((result.stderr or result.stdout).split())[-500:]
        raise DataError(f"{' '.join(command[:2])} {package} failed with exit code {result.returncode}: {said}")
    return tarballs[0]


def _unpack(tarball: Path, style: Style, directory: Path) -> None:
    """Writes the JSON files of a tarball into a new directory."""
    data = tarball.read_bytes()
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != style.sha512:
        raise DataError(f"{tarball.name} has the sha512 {found}, not {style.sha512}: this is another file")
    directory.mkdir()
    with tarfile.open(tarball) as archive:
        for name in _MEMBERS:
            member = archive.extractfile(f"package/{name}")
            assert member is not None, name  # the sha512 fixes the content
            (directory / name).write_bytes(member.read())

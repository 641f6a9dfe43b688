"""Checks and encodes a user's values for other machines, so that neither a shell nor Kubernetes runs them as code.

A script contains values as base64, and a manifest as text with escaped dollar signs. Values that a cloud restricts
(projects, images, ...) are checked against its rules.
"""

import base64
import re
import unicodedata
from collections.abc import Sequence

from launch.errors import LaunchError

# Allowed values by flag.
_PATTERNS = {
    "project": r"[a-z0-9][a-z0-9.:-]*",
    "zone": r"[a-z0-9][a-z0-9-]*",
    "runtime-version": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "service-account": r"[A-Za-z0-9][A-Za-z0-9.@:_-]*",
    "image": r"[A-Za-z0-9][A-Za-z0-9._:/-]*(@sha256:[0-9a-f]{64})?",
}
_DIGEST = r".*@sha256:[0-9a-f]{64}"
_SECRET_ENDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"


def check_characters(flag: str, value: str) -> str:
    """Returns `value`. Raises LaunchError if it has a control character, such as a newline.

    A control character could end a line of a script and begin another command.
    """
    found = next((letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if found is not None:
        raise LaunchError(f"{flag}={value!r}: must have no control characters, it has {found!r}")
    return value


def check_option(flag: str, value: str) -> str:
    """Returns the value of a flag for other programs, or "".

    Raises:
      LaunchError: the cloud's rules do not allow the value, or another program would read it as an option.
    """
    if value and not re.fullmatch(_PATTERNS[flag], value):
        raise LaunchError(f"--{flag}={value!r}: must match {_PATTERNS[flag]}")
    return value


def check_image(image: str, unpinned: bool) -> str:
    """Returns the name of an image, or "".

    Raises:
      LaunchError: the name has no digest and `unpinned` is False. A tag can name another image after a restart or on
        another host.
    """
    if check_option("image", image) and not unpinned and not re.fullmatch(_DIGEST, image):
        raise LaunchError(
            f"--image={image}: must end with @sha256:DIGEST, which docker push prints, because a tag can name another "
            f"image on another host or after a restart (--unpinned-image allows it)"
        )
    return image


def parse_environment(pairs: Sequence[str]) -> dict[str, str]:
    """Returns the values of --env by name.

    Raises:
      LaunchError: an item is no NAME=VALUE, has a control character, or looks like a secret, which would be visible in
        manifests, scripts, dry runs and lists of processes. The message does not repeat values.
    """
    for pair in pairs:
        name = pair.partition("=")[0]
        if "=" not in pair or not re.fullmatch(_NAME, name):
            raise LaunchError(f"--env={name}: must be NAME=VALUE")
        if name.upper().endswith(_SECRET_ENDS):
            raise LaunchError(
                f"--env={name}=...: looks like a secret, which scripts and manifests would show; "
                f"--secret-env={name} keeps it out of them"
            )
        check_characters("--env", pair)
    return dict(pair.split("=", 1) for pair in pairs)


def check_secret_names(names: Sequence[str], environment: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names of --secret-env.

    Raises:
      LaunchError: an item is no name of a variable, or --env also sets it.
    """
    for name in names:
        if not re.fullmatch(_NAME, name):
            # The message does not repeat the text, because it may contain a secret.
            raise LaunchError("--secret-env: must be the name of a variable, without its value")
        if name in environment:
            raise LaunchError(f"--secret-env={name}: is given by --env too")
    return tuple(dict.fromkeys(names))


def bash_array(name: str, words: Sequence[str]) -> str:
    """Returns a line of bash that sets the array `name` to `words`, whatever characters they have.

    They are encoded, with a zero byte after each, so that the shell never interprets them.
    """
    for word in words:
        check_characters("argument", word)
    data = base64.b64encode("".join(f"{word}\0" for word in words).encode()).decode()
    return f"mapfile -d '' -t {name} < <(base64 -d <<< '{data}')"


def kubernetes_text(value: str) -> str:
    """Returns `value` escaped for command, args and env of Kubernetes, which rewrites $(NAME) and $$."""
    return value.replace("$", "$$")

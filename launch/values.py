"""Carries a user's values to other machines, so that no shell and no Kubernetes reads one of them as code.

Values go into a script as base64 and into a manifest as text whose dollar signs are escaped. What a cloud's own rules
restrict (projects, images, ...) is compared with them first.
"""

import base64
import re
import unicodedata
from collections.abc import Sequence

from launch.errors import LaunchError

# What follows --, and what a value of it may be.
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
    """Returns `value`; raises LaunchError if it has a control character, such as a newline.

    A line of a script could end there and another command begin.
    """
    found = next((letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if found is not None:
        raise LaunchError(f"{flag}={value!r}: must have no control characters, it has {found!r}")
    return value


def check_option(flag: str, value: str) -> str:
    """Returns the value of a flag that is given to other programs, or "".

    Raises:
      LaunchError: the cloud's rules have no such value; one that begins with a dash would be read as an option.
    """
    if value and not re.fullmatch(_PATTERNS[flag], value):
        raise LaunchError(f"--{flag}={value!r}: must match {_PATTERNS[flag]}")
    return value


def check_image(image: str, unpinned: bool) -> str:
    """Returns the name of an image, or "".

    Raises:
      LaunchError: it has no digest and `unpinned` is False: a tag can mean another image after a restart, or on
        another host.
    """
    if check_option("image", image) and not unpinned and not re.fullmatch(_DIGEST, image):
        raise LaunchError(
            f"--image={image}: must end with @sha256:DIGEST, which docker push prints; what a tag means can change "
            f"between hosts and restarts (--unpinned-image allows it)"
        )
    return image


def parse_environment(pairs: Sequence[str]) -> dict[str, str]:
    """Returns the values of --env by name.

    Raises:
      LaunchError: one is no NAME=VALUE, has a control character, or looks like a secret: it would stand in manifests,
        scripts, dry runs and lists of processes. The message does not repeat a value.
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
      LaunchError: one is no name of a variable, or is given a value too.
    """
    for name in names:
        if not re.fullmatch(_NAME, name):
            # The text is not repeated: it may be a name and a secret.
            raise LaunchError("--secret-env: must be the name of a variable, without its value")
        if name in environment:
            raise LaunchError(f"--secret-env={name}: is given by --env too")
    return tuple(dict.fromkeys(names))


def bash_array(name: str, words: Sequence[str]) -> str:
    """Returns a line of bash that sets the array `name` to `words`, whatever characters they have.

    They are encoded, each with a zero byte after it, so the shell never reads them.
    """
    for word in words:
        check_characters("argument", word)
    data = base64.b64encode("".join(f"{word}\0" for word in words).encode()).decode()
    return f"mapfile -d '' -t {name} < <(base64 -d <<< '{data}')"


def kubernetes_text(value: str) -> str:
    """Returns `value` as Kubernetes has to be given it in command, args and env, where $(NAME) and $$ are rewritten."""
    return value.replace("$", "$$")

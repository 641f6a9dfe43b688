"""Cuts latents into square patches and back. Axes: B batch, N patches, D numbers in a patch."""

from jaxtyping import Array, Float


def patchify(x: Float[Array, "B h w c"], patch: int) -> Float[Array, "B N D"]:
    """Cuts images into patches, row by row; a patch is flattened as (row, column, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Float[Array, "B N D"], patch: int, channels: int) -> Float[Array, "B h w c"]:
    """Returns the square images whose `patchify` is `tokens`."""
    batch, num_tokens, _ = tokens.shape
    grid = round(num_tokens**0.5)
    x = tokens.reshape(batch, grid, grid, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * patch, grid * patch, channels)

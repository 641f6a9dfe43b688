"""Computes from histograms of captions how much room they need where a text encoder packs them: `models.packing`."""

from fractions import Fraction

import numpy as np

from ecdit.data.config import rate_of
from ecdit.data.prepared import Prepared
from ecdit.data.tokenizer import load_tokenizer
from ecdit.models.packing import stream_tokens

OVERFLOW = 0.001  # share of batches whose captions may fail to fit


def length_shares(prepared: Prepared) -> np.ndarray | None:
    """Returns the share of each length, from 0 tokens on, among the captions that training reads.

    Where some records lack a field that others have, it is an estimate. It returns None if some captions are generated,
    so that nobody has counted them, or if two tokenizers share a row.
    """
    config, tokenizer = prepared.config, load_tokenizer(prepared.tokenizer)
    if len(tokenizer.parts) > 1:
        return None
    shares = np.zeros(config.caption_length + 1)
    for component, part in zip(prepared.composition.components, prepared.stored, strict=True):
        if part is None:
            return None
        by_rate: dict[str, np.ndarray] = {}  # counts of each list of captions, which is drawn as one
        for field, counts in part.tokens.histograms.items():
            if (rate := rate_of(config.captions, field)) is not None:
                found = by_rate.setdefault(rate, np.zeros_like(shares))
                for length, count in counts.items():
                    found[min(int(length), config.caption_length)] += count
        drawn = sum(config.captions[rate] * found / found.sum() for rate, found in by_rate.items() if found.any())
        shares += float(Fraction(component.rate)) * drawn / np.sum(drawn)
    shares *= (1 - config.caption_dropout) / shares.sum()
    shares[min(len(tokenizer.empty), config.caption_length)] += config.caption_dropout
    return shares


def overflow(shares: np.ndarray, packed_length: int, captions: int, parts: int) -> float:
    """Returns the share of batches in which the captions of some part need more room than they have.

    Args:
      shares: of each length, from 0 on: `length_shares`.
      packed_length: room for each caption on average, as `text.packed_length`.
      captions: of a part, which is a device's share of a microbatch.
      parts: of a batch.
    """
    room, longest = stream_tokens(packed_length, captions, len(shares) - 1), captions * (len(shares) - 1)
    if room >= longest:
        return 0.0
    sums = np.fft.irfft(np.fft.rfft(shares, longest + 1) ** captions, longest + 1)
    return float(-np.expm1(parts * np.log1p(-min(max(sums[room + 1 :].sum(), 0.0), 1.0 - 1e-15))))


def least_packed_length(shares: np.ndarray, captions: int, parts: int, most: float = OVERFLOW) -> int:
    """Returns the least `text.packed_length` with which at most the share `most` of batches overflows."""
    low, high = 1, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if overflow(shares, middle, captions, parts) <= most else (middle + 1, high)
    return low


def packing_line(prepared: Prepared, packed_length: int, captions: int, parts: int) -> str:
    """Returns the line of a run that says how often its captions overflow, "" if it is unknown."""
    shares = length_shares(prepared)
    if shares is None:
        return ""
    if stream_tokens(packed_length, captions, len(shares) - 1) >= captions * (len(shares) - 1):
        return f"text.packed_length = {packed_length} packs nothing: {captions} padded captions a device take no more"
    mean, least = float(shares @ np.arange(len(shares))), least_packed_length(shares, captions, parts)
    return (
        f"captions have {mean:.1f} tokens on average; with text.packed_length = {packed_length} they do not fit in "
        f"{overflow(shares, packed_length, captions, parts):.2%} of batches, which are padded; the least length with "
        f"at most {OVERFLOW:.1%} is {least}"
    )

"""Tests on which captions a tokenizer is trained."""

from ecdit.data.preparation import prepare_records
from ecdit.data.tokens import _captions
from tests.data.example import make_config, module


def test_a_tokenizer_of_a_mixture_is_trained_on_its_captions_by_their_rates(tmp_path):
    """30 records at a rate of 3/4: each once, and ten generated captions. Only fields with a rate are read."""
    more = 'add_mixture("three_and_shapes", [("three_of_four", 0.75), ("shapes", 0.25)])'
    where = module(tmp_path, "three_of_four", "30", more)
    changes = {"crop_padding": 0, "flip_probability": 0, "captions": {"caption": 1.0, "other": 0.0}}
    config = make_config(tmp_path / "data", module=where, task="three_and_shapes", vocab_size=512, **changes)
    captions = list(_captions(config, prepare_records(config, 1, lambda _: None)))
    stored = [text for text in captions if text.startswith("image ")]
    assert sorted(stored) == sorted(f"image {i}" for i in range(30))
    assert len(captions) - len(stored) == 10
    assert not any(text.startswith("number ") for text in captions)

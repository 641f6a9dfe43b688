"""Captions to images: the sampler, and grids and heat maps of what it drew."""

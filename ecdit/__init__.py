"""EC-DIT in JAX: text-to-image diffusion transformers in which experts choose tokens (arXiv 2410.02098)."""

__version__ = "0.1.0"

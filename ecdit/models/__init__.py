"""The denoiser, as a plain reference."""

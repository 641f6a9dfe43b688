"""Captions and pictures to arrays: text towers, autoencoders, and the model they make with a denoiser."""

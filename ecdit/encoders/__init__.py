"""Captions to text states and images to latents: the text encoders and the autoencoders."""

"""Public networks with their published weights: text encoders, autoencoders, and networks for evaluation.

Each network is one file: a frozen config, a function that reads it from a folder's config.json, and the module.
`weights.load` fills a module's parameters from a folder (`safetensors_folder`, `t5x_checkpoint`).
"""

"""Public networks with published weights: text encoders, autoencoders, and networks for evaluation.

Each network is one file with a frozen config, a function that reads the config from a folder's config.json, and the
module. `weights.load` fills a module's parameters from a folder (`safetensors_folder`, `t5x_checkpoint`).
"""

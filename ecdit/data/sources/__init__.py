"""Sources of images with captions: one file each, behind the protocol of `protocol.Source`."""

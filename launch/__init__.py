"""The commands that start, show and stop training, and in `backends` a file for each place where training runs."""

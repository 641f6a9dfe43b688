"""Commands that start, show and stop training, with one file in `backends` for each place where training runs."""

"""What exists for the speed of one kind of device; `models` has the readable reference of all of it."""

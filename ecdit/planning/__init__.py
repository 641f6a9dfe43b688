"""Plans a run before it starts: its parameters, FLOPs, memory and time."""

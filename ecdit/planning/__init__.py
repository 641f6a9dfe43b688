"""Plans a run before it starts: parameters, operations, memory, time."""

"""What a run will need before it has started: parameters, operations, memory, time."""

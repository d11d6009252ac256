"""What a run would take on a pod that is not here: the real program, compiled ahead of time."""

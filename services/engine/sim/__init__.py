"""The simulated runtime: everything of an engine but the model's arithmetic, which takes its time all the same."""

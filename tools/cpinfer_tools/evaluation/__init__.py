"""Long-context evaluation: questions of the tasks, put to the engine, scored."""

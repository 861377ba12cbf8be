"""Long-context tasks: made from a seed with the model's own tokenizer, or read from a local file. No torch here."""

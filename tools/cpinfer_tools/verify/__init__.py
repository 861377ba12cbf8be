"""One question, asked in several ways: is it the same? Beside other layouts, beside Transformers, beside training."""

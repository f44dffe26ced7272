"""Guards: models that say how unsafe an answer is, up to every token of it."""

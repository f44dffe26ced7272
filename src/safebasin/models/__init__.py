"""Models: loading, adapters, the bundled small model, hooks."""

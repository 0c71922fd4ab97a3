"""A host: it loads a span of a model and runs it."""

"""One output against its checkpoint."""

"""Output formats; each package turns a checkpoint into one of them."""

"""The bytes of a model folder, in and out."""

"""What config.json and the tensor names of a checkpoint mean."""

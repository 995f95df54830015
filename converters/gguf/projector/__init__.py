"""The projector file of a model with image towers."""

"""The image towers."""

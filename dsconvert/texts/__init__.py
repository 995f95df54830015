"""Text from any place, its token ids, and windows of them."""

"""What the block-wise formats share."""

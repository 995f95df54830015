"""MLX: affine weights in groups, as mlx.core.quantize stores them; the folder, and its reader."""

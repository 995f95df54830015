"""dsconvert: model conversion and quantization for the DeepSeek family, with proof."""

__version__ = "0.2.0"

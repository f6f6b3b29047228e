"""llmpipe: one recipe file becomes a DeepSpeed pipeline-parallel training job for any Hugging Face model."""

__version__ = "0.1.0"

"""Models of other programs in and out: safetensors, Hugging Face configurations, GGUF."""

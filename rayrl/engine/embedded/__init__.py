"""The embedded engine: small Hugging Face models, without vLLM."""

"""Token by token: backends, key-value caches, samplers and batches of LoRA adapters."""

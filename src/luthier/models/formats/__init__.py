"""Files of models: safetensors, PEFT, diffusers pipelines, GGUF, and rules for imported files."""

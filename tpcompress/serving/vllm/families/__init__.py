"""One file per model type that vLLM serves, named like the model type; each defines `ADAPTER`."""

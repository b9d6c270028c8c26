"""Training stages of the bundled base model; `scripts/build_tiny_base.py` runs them in order."""

"""Stages that build the bundled base from nothing; ``scripts/build_tiny_base.py`` runs them in order."""

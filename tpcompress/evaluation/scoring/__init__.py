"""Scoring: a model on rows of data, the answers counted per image and family, and intervals over images and seeds."""

"""Sources of the documentation site: guides, and the generator of the reference pages. `scripts/docs` builds it."""

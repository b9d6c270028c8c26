"""Plug-ins of serving engines."""

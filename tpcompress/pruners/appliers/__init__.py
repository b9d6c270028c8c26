"""How the gates of a choice act on the model in training: one file each, found by being here."""

"""What gives each vision token a score: one file each, found by being here."""

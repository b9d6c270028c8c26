"""What chooses tokens by their scores, and which gradient the choice has: one file each, found by being here."""

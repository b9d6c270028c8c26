"""Official behaviour of pruners that is too long for their own file; no pruner is registered here."""

"""From a base model and a data file to a run, or to a compared and verified export, by one command each."""

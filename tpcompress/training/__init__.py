"""Training: the LightningModule, its data modules, objectives, schedules and callbacks."""

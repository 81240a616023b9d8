"""Training stages: the LightningModules and what they need."""

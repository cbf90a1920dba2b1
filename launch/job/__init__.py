"""Job scripts: sites, schedulers and submission."""

"""DeepSpeed configurations, one purpose each."""

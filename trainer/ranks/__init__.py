"""Ranks as processes: their devices, collectives, launchers, signals and exit statuses."""

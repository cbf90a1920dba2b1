"""The demo: molecules and crystals, labelled on the spot by five engines."""

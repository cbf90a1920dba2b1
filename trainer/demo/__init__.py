"""The demo: molecules and crystals, labelled during the demo by five methods."""

"""Everything that the commands draw on a terminal or write as HTML."""

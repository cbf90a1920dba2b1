"""Tables of results that a list of runs makes: `make results NAME=encoders`; what is done is not done again."""

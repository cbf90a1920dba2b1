"""Programs that run on the nodes of a job: checks, copying of shards, and the watcher of each rank."""

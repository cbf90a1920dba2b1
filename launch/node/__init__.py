"""What runs on the nodes of a job: checks, copies of shards, and the watcher of each rank."""

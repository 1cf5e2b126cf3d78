"""What lies on disk: tar shards, their index, records, and copies of remote shards."""

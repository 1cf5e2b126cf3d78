"""From users' files to shard sets: reading inputs, building, checking, reporting."""

"""A job on Ray: workers, shards in flight, progress and the end. Only this package imports ray."""

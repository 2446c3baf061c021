"""The programs that made the demo's model and shards; they are not installed with the package."""

"""One shard from tar to Parquet on one device, without ray: model, batches, maps, masks, rows."""

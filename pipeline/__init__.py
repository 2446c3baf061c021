"""The application: shards of captioned images in, pseudo-masks as Parquet out."""

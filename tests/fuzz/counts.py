"""How many inputs of each target `make test` tries."""

INPUTS = {
    "tar": 1500,
    "compressed tar": 500,
    "image": 1500,
    "caption": 600,
    "RLE": 1500,
    "footers and records": 250,
    "compacted folder": 150,
    "config": 200,
    "list file": 250,
    "COCO JSON": 200,
    "caption table": 300,
    "Parquet of images": 200,
}
# what the harness is tested with
FAULTS = ("none", "error", "wrong pairing", "file", "segmentation fault", "warning")

"""Masks as other tools read them: COCO JSON, VOC and mmsegmentation trees, WebDataset.

write (which shards, resuming, counts) -> samples (image and rows of each) -> coco | voc | webdataset
"""

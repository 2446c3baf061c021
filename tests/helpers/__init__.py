"""Helpers that several tests share: corpora, models, servers, hostile files, readers of results."""

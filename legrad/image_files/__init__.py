"""Untrusted files of images: `opener` decodes them; one module a format finds damage that decoders pass over.

Checksums, end marks, lengths and stray marks are compared with what they should be. What a decoder refuses by
itself is not looked for again.
"""

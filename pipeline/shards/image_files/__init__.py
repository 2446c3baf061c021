"""Damage that image files themselves show and decoders pass over: checksums, end marks, lengths, stray marks.

One module a format. Nothing here decodes pixels; what a decoder refuses by itself is not looked for again.
"""

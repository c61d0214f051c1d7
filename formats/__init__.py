"""The .salr file: codecs, layout, reader, writer and validation. Needs numpy, safetensors and xxhash only."""

if "." not in __name__:
    raise ImportError(
        f"this folder is a part of salr, and would be a second copy of it as {__name__!r}: import salr.formats"
    )

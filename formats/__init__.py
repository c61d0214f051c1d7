"""The .salr file: codecs, layout, reader, writer and validation. Needs numpy, safetensors and xxhash only."""

"""The .salr file: codecs, layout, reader, writer and validation. Needs numpy, safetensors and xxhash only."""

# Fails at once where this folder is imported under the wrong name (`import formats`), as a second copy of itself.
from .. import __version__ as __version__

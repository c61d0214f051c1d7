"""Running .salr modules: the torch layer, its backends, and loading of whole models."""

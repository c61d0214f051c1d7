"""From a finished file to directories that others load: transformers, PEFT, dense models."""

"""SALR inside other libraries: transformers and PEFT."""

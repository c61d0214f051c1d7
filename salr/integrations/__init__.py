"""SALR inside other libraries: transformers and PEFT."""

#: the quantization method's name in a config.json
METHOD = "salr"

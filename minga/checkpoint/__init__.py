"""Models on disk: dictionaries of tensors in and out. Nothing here knows `minga.model`; they meet through `names`.

Modules:
  names.py       the one table of tensor names: public (Hugging Face), GGUF, ours
  hf.py          folders as Hugging Face writes them: config.json and *.safetensors
  gguf.py        GGUF files, read only; ggml_types.py holds their number formats
  durable.py     folders that are either whole or not there, whatever happens while they are written
"""

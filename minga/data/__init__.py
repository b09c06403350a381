"""From documents to batches: text is read, tokenized to memory-mapped shards, packed, and loaded with an exact memory.

- `sources.py`: files, folders, globs, stdin, JSON lines -> documents
- `corpus.py`: copies dropped, training text and held-out text divided
- `tokenizer.py`: text <-> token ids, messages -> token ids; byte-level BPE, opened or trained
- `tokenizer_json.py`: the file behind a tokenizer, and how a GGUF file becomes one
- `chat_template.py`: the Jinja half of messages, and what keeps them from forging control tokens
- `shards.py`: documents -> a folder of token files with a manifest (`minga data`)
- `packing.py`: windows of tokens -> inputs, targets, segments (pure functions)
- `loader.py`: shards -> an endless stream of batches that stops and resumes anywhere; evaluation batches
"""

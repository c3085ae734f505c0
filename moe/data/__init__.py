"""From files of documents to batches of packed sequences.

records      documents in ArrayRecord files, with a manifest
embedded     the two corpora that need no download
tokenizers   text to ids
pipeline     the training loader: shuffle, pack, mix, exact state
evaluation   windows that score each byte once
"""

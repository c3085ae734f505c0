"""From files of documents to batches of packed sequences.

records      documents in ArrayRecord files, with a manifest
text_files   documents of the files that people have, in one pass
building     a domain of them, by several processes; goes on after a kill
embedded     the two corpora that need no download
tokenizers   text to ids
mixture      which domain each row is of
rows         virtual shards: shuffle, pack, mix, exact state
pipeline     the training loader
evaluation   windows that score each byte once
"""

"""Pre-training of mixture-of-experts language models on TPU meshes with JAX.

Axis legend, used in shapes and in the suffixes of array names throughout:

    B  batch: sequences of one micro-batch, over all data shards
    S  sequence: tokens of one packed sequence
    T  tokens: B x S where the two are one axis
    D  model width
    H  query heads            G  key/value heads (H is a multiple of G)
    F  hidden width of one expert (or of a dense feed-forward block)
    E  routed experts
    K  experts chosen for each token (top-k)
    C  capacity: token slots of one expert in one drop group
    L  layers
    V  vocabulary
    M  micro-batches of one optimizer step
"""

import os

# A listing of a bucket is not kept: another process, or host, may have written since.
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')

"""The sizes at which the approximate backward on a GPU cuts its list of (token, block) pairs."""

#: Vocabulary entries of a block: the width of a tile of the tensor-core kernels.
PAIR_BLOCK = 128
#: Tokens of a span: the height of that tile. The list notes where each block's tokens of each span begin.
PAIR_SPAN = 128

"""The same model on many ranks: replicated, sharded, expert-parallel, pipelined.

Ranks form a grid [pipeline, data, expert, shard]. `pipeline` divides the blocks, `expert` the
experts, `shard` the rows of every weight; all axes but `pipeline` also divide the batch. Every loss
is multiplied by its micro-batch's share of the global batch, so that gradients are only summed.
"""

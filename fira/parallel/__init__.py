"""The same model on many ranks: replicated, sharded, expert-parallel, pipelined.

Ranks form a grid [pipeline, data, expert, shard]. All but the pipeline's axis divide the batch;
`expert` divides the experts, `shard` the rows of every weight, `pipeline` the blocks. Every loss is
multiplied by its micro-batch's share of the global batch, so that gradients are only summed.
"""

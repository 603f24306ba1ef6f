"""The same model on many ranks: replicated, sharded, expert-parallel, pipelined.

Ranks form a grid [pipeline, data, expert, shard]. All but the pipeline's axis divide the batch;
`expert` divides the experts, `shard` the rows of every weight, `pipeline` the blocks. Gradients of
ranks are summed as those of micro-batches are, and `finish_step` divides once by all of them.
"""

"""What a run trains on: batches for Megatron, checks of data sets, and what is read of tokenizers."""

"""What a run trains on: batches for Megatron, and checks of the data before it is read."""

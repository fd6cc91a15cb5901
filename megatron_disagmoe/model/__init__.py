"""The attention half and the expert half of Megatron's GPT model, cut out of Megatron's own modules."""

"""What training is made of besides the model: optimiser, length, teacher's logits, starts from other networks."""

"""What is learnt from labels: training data, what to ask people about next, and what goes wrong again and again."""

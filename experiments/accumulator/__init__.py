"""What a GPU's matrix units cut off log-probs, simulated: the tables of docs/MATH.md section 7."""

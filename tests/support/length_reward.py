"""A reward file in EasyR1's form, with some spread on what an untrained model says."""


def compute_score(reward_inputs):
    """Accuracy: an even number of characters, which an untrained model has half of the time."""
    scores = []
    for item in reward_inputs:
        right = float(len(item["response"]) % 2 == 0)
        scores.append({"overall": right, "format": 1.0, "accuracy": right})
    return scores

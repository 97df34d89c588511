"""Push new weights from the learner to every replica and confirm that they arrived."""

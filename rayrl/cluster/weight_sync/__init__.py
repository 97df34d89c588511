"""New weights from the learner to every replica, each push confirmed."""

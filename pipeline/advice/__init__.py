"""What frozen features say before anything is trained: probes of every block, the learning curve, and advice."""

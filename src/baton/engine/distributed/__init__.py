"""One model on several ranks: who they are (`topology`), how they meet and watch each other (`control`, `heartbeat`), what the leader
tells the others (`messages`), how their tensors meet (`connect`: `exchange`, `links` or `collective`), how pipeline
stages follow one another (`pipeline`, `ring`), and what a rank that only follows does (`follower`)."""

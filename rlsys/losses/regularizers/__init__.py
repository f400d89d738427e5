"""Terms added to the policy loss: one class that extends `rlsys.losses.Regularizer` per file."""

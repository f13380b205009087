"""The paper's two claims on a run: activations over the timesteps, the error along the trajectory."""

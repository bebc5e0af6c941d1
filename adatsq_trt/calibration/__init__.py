"""Full-precision trajectories, Fisher information, weighted Hessians and the GPTQ solver."""

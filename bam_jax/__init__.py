"""bam_jax: Branch-Attend-Mix (arXiv 2408.08274) in JAX and Flax."""

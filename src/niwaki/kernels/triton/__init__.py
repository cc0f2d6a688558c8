"""GPU kernels in Triton. The modules of `niwaki.kernels` choose and launch them; no other module imports them."""

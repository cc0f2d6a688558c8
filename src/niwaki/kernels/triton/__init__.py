"""GPU kernels in Triton. The modules of `niwaki.kernels` choose and launch them; nothing else imports them."""

"""The two architectures, on one device, and what they share.

Shape legend of the whole project (activations carry their shape as a suffix, `weights_NK`):
B batch, T time, N=B*T tokens, D width, H heads, G key-value heads, C head width, V vocabulary,
E experts, K chosen experts, F expert hidden width, R=N*K routed rows, L layers.
"""

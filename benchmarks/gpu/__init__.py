"""What only a GPU's suite has: kernels one by one, the tests on the device, its tools, and a bundle without network."""

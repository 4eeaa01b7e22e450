"""The capture core: which modules are meant, the hooks on them, freeze, and the steps as CUDA graphs."""

"""The command line: the only place with Hydra and OmegaConf."""
